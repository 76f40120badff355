"""A model with adapters made ready for its steps, the same way for a run and for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_kit.config.training import TrainingConfig
from qlora_kit.lora.block import use_fused_blocks
from qlora_kit.training.attention import set_packed_attention
from qlora_kit.training.recompute import set_recompute


def prepare_model(model: Any, config: TrainingConfig, recompute: str | Sequence[str]) -> str | None:
    """Choose attention, blocks and recompute; None, or why its own blocks stay as they are."""
    set_packed_attention(model)
    note = use_fused_blocks(model) if config.fused_blocks else None
    set_recompute(model, recompute)
    return note

"""Tiny models with fresh adapters, prepared as a run prepares them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import save_checkpoint

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.prepare import prepare_model


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random checkpoint of a family, each once: `base_of("qwen2", intermediate_size=173)`.

    Its sizes are multiples of the quantization block, or PEFT would be silently wrong on it.
    """
    root = tmp_path_factory.mktemp("training")

    @functools.cache
    def make(family: str = "llama2", intermediate_size: int = 192) -> Path:
        directory = root / f"{family}-{intermediate_size}"
        save_checkpoint(directory, family, intermediate_size=intermediate_size)
        return directory

    return make


@pytest.fixture
def model(base_of: Callable[..., Path]) -> Callable[..., Any]:
    """Makes a model with fresh adapters, as `finetune` does: `model(bits=4, dropout=0.1)`.

    With `recompute` None it is not prepared, as for a trainer that is not ours.
    """

    def make(
        bits: int = 16,
        dtype: str = "fp32",
        *,
        family: str = "llama2",
        ffn: int = 192,
        recompute: str | tuple[str, ...] | None = "full",
        fused_blocks: bool = True,
        **lora: Any,
    ) -> Any:
        loaded = load_base(str(base_of(family, ffn)), bits=bits, dtype=dtype).model
        inject_lora(loaded, LoRAConfig(**{"r": 4, "alpha": 8.0, **lora}), seed=1)
        if recompute is not None:
            assert (
                prepare_model(loaded, TrainingConfig(fused_blocks=fused_blocks), recompute) is None
            )
        return loaded

    return make

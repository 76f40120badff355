"""qlora_kit, built and stepped as `finetune` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from peers import step_dtype
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.target import dtype_name
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model


class Peer:
    """A model with its optimizer; `step` trains on ids (B, T), every token supervised."""

    def __init__(self, directory: Path, bits: int, level: str, rank: int, device: str) -> None:
        dtype = dtype_name(step_dtype(device))
        base = open_base(BaseConfig(str(directory), bits=bits, dtype=dtype, device=device))
        lora = LoRAConfig(r=rank, alpha=2 * rank, target_modules="q_proj,v_proj")
        training = TrainingConfig(optim="adamw", learning_rate=1e-4)
        self.model: Any = inject_lora(read_weights(base), lora, seed=training.seed)
        note = prepare_model(self.model, training, level)
        assert note is None, note
        self.optimizer = make_optimizer(
            training.optim, self.model.parameters(), training.learning_rate
        )
        self.model.train()
        self._step = 0

    def step(self, ids: Tensor) -> Tensor:
        """One optimizer step; its loss."""
        self._step += 1
        batch = collate([Encoded(row, row) for row in ids.tolist()], 0)
        loss, _ = train_step(
            self.model, [batch], self.optimizer, step=self._step, max_grad_norm=1.0
        )
        return loss

"""qlora_kit, as `finetune` builds and steps a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers import step_dtype
from qlora_kit.base.load import open_base, read_weights
from qlora_kit.base.tensors import dtype_name
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model


class Peer:
    """A model with its optimizer; `step` trains on ids (B, T), every token supervised."""

    def __init__(self, directory: Path, bits: int, level: str, rank: int, device: str) -> None:
        dtype = dtype_name(step_dtype(device))
        base = BaseConfig(model=str(directory), bits=bits, dtype=dtype, device=device)
        config = LoRAConfig(r=rank, alpha=2 * rank, target_modules="q_proj,v_proj")
        self.model: Any = inject_lora(read_weights(open_base(base)), config)
        note = prepare_model(self.model, TrainingConfig(), level)
        assert note is None, note
        self.optimizer = make_optimizer("adamw", self.model.parameters(), 1e-4)
        self.model.train()
        self._step = 0

    def step(self, ids: Tensor) -> Tensor:
        """One optimizer step; its loss."""
        batch, length = ids.shape
        self._step += 1
        places = torch.arange(batch * length).view(batch, length)
        supervised = places[:, :-1].reshape(-1)
        window = {
            "input_ids": ids,
            "labels": ids,
            "position_ids": torch.arange(length).repeat(batch, 1),
            "supervised": supervised,
            "num_supervised": supervised.numel(),
            "lengths": [length] * batch,
        }
        loss, _ = train_step(
            self.model, [window], self.optimizer, step=self._step, max_grad_norm=1.0
        )
        return loss

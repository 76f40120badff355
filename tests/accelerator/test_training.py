"""The training step on a device: nothing mixed, nothing read back, only the batch copied."""

from __future__ import annotations

from typing import Any

import torch
from accelerator import accelerator, copied, in_order, saved
from micro_batches import ragged_rows

from qlora_kit.data.batch import Batch, collate
from qlora_kit.training.attention import known_rows
from qlora_kit.training.loop import train_step


def step(model: Any, optimizer: torch.optim.Optimizer, *batches: Any) -> None:
    with known_rows(False):
        loss, norm = train_step(model, batches, optimizer, step=1, max_grad_norm=1.0)
    assert loss.device == norm.device == model.device


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [one for one in batch.values() if isinstance(one, torch.Tensor)]


def test_a_step_copies_the_batch_alone_and_reads_nothing() -> None:
    batch = collate(ragged_rows(3), 0)
    with accelerator() as card:
        model = card.adapted(saved("llama2"), bits=4, recompute="full")
        optimizer, given = card.optimizer(model), card.on_host(batch)
        with card.watch() as seen:
            step(model, optimizer, given)
    assert in_order(seen.copied_in) == copied(tensors(batch))
    assert seen.copied_out == []

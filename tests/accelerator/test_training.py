"""The training step on a device: nothing mixed, nothing read back, only the batch copied."""

from __future__ import annotations

from typing import Any

import torch
from accelerator import accelerator, in_order, of_batch, rows_are_known, saved, small_batch

from qlora_kit.training.loop import train_step


def step(model: Any, optimizer: torch.optim.Optimizer, *batches: Any) -> None:
    with rows_are_known():
        loss, norm = train_step(model, batches, optimizer, step=1, max_grad_norm=1.0)
    assert loss.device == norm.device == model.device


def test_micro_batches_go_up_one_by_one_and_nothing_is_read() -> None:
    first, second = small_batch(), small_batch(seed=1)
    with accelerator() as card:
        model = card.adapted(saved("llama2"), recompute="full", dropout=0.1)
        optimizer, given = card.optimizer(model), [card.on_host(one) for one in (first, second)]
        with card.watch() as seen:
            step(model, optimizer, *given)
            step(model, optimizer, *given)
    assert in_order(seen.copied_in) == of_batch(first, second, first, second)
    assert seen.copied_out == []

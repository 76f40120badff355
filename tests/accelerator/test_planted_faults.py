"""What breaks the laws of this folder is found: each fault is planted into a step that keeps them.

The others were seen on CUDA: a tensor made on the host, a value that is waited for, a choice by a
value, a mask that goes up with each step, a cast to a number, rows picked by a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import (
    Accelerator,
    HostReadError,
    MixedDevicesError,
    accelerator,
    in_order,
    of_batch,
    saved,
    small_batch,
)
from torch import Tensor

from qlora_kit.training.loop import train_step
from qlora_kit.training.loss import Objective

Fault = Callable[[Tensor], Tensor]


def host_tensor(loss: Tensor) -> Tensor:
    return (loss * torch.ones(3)).sum()


def item(loss: Tensor) -> Tensor:
    return loss * (1.0 if loss.item() else 2.0)


def branch(loss: Tensor) -> Tensor:
    return loss * 2 if loss > 0 else loss


def number(loss: Tensor) -> Tensor:
    return loss / float(loss.detach())


def to_list(loss: Tensor) -> Tensor:
    return loss * len(torch.stack((loss, loss)).tolist())


def on_the_host(loss: Tensor) -> Tensor:
    return loss * loss.detach().cpu().to(loss.device)


def same(loss: Tensor) -> Tensor:
    return loss * torch.equal(loss, loss)


def picked(loss: Tensor) -> Tensor:
    many = loss.expand(4)
    return many[many > 0].sum()


def host_index(loss: Tensor) -> Tensor:
    return loss.expand(4)[torch.tensor([1, 2])].sum()


def host_generator(loss: Tensor) -> Tensor:
    drawn = torch.empty_like(loss.expand(4)).bernoulli_(0.5, generator=torch.Generator())
    return loss * drawn.sum()


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 if grad > 0 else grad


def in_backward(loss: Tensor) -> Tensor:
    applied: Tensor = InBackward.apply(loss)
    return applied


def step_with(fault: Fault, card: Accelerator, may_read: bool = False) -> Any:
    """A step whose loss goes through a fault; what was seen."""
    model = card.adapted(saved("llama2", num_hidden_layers=1), bits=16)
    optimizer, given = card.optimizer(model), card.on_host(REAL)
    planted = Planted(fault)
    with card.watch(may_read) as seen:
        train_step(model, [given], optimizer, step=1, max_grad_norm=1.0, objective=planted)
    return seen


class Planted(Objective):
    """The objective of fine-tuning with a fault behind it."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def sums(self, model: Any, batch: Any) -> Tensor:
        return self._fault(super().sums(model, batch))


REAL = small_batch()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (host_tensor, MixedDevicesError),
        (host_index, MixedDevicesError),
        (host_generator, MixedDevicesError),
        (item, HostReadError),
        (branch, HostReadError),
        (number, HostReadError),
        (to_list, HostReadError),
        (on_the_host, HostReadError),
        (same, HostReadError),
        (in_backward, HostReadError),
        (picked, HostReadError),
    ],
)
def test_a_fault_in_a_step_raises(fault: Fault, error: type[Exception]) -> None:
    with accelerator() as card, pytest.raises(error):
        step_with(fault, card)


def test_a_step_without_a_fault_keeps_the_laws() -> None:
    with accelerator() as card:
        seen = step_with(lambda loss: loss, card)
    assert in_order(seen.copied_in) == of_batch(REAL)


def test_a_mask_that_goes_up_with_each_step_is_counted() -> None:
    def mask(loss: Tensor) -> Tensor:
        return loss * torch.tril(torch.ones(8, 8)).to(loss.device).mean()

    with accelerator() as card:
        seen = step_with(mask, card)
    assert [one for one in seen.copied_in if one.shape == (8, 8)]
    assert len(seen.copied_in) == len(of_batch(REAL)) + 1


def test_a_list_that_becomes_a_tensor_of_the_device_is_counted() -> None:
    with accelerator() as card:
        seen = step_with(lambda loss: loss * torch.tensor([1.0, 2.0], device=loss.device)[0], card)
    assert [one.shape for one in seen.copied_in].count((2,)) == 1


def test_reads_are_counted_where_they_are_allowed() -> None:
    with accelerator() as card:
        seen = step_with(lambda loss: number(branch(loss)), card, may_read=True)
    assert seen.reads == [(), ()]

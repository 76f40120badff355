"""What comes from files and goes to them, on a device: each tensor once, and no further.

Fakes have no values, so what is written is looked at up to where a value is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerator import (
    Accelerator,
    Copied,
    accelerator,
    copied,
    in_order,
    saved,
    small_batch,
)
from torch import Tensor

from qlora_kit.base.fill import fill
from qlora_kit.export.tensors import export_tensors
from qlora_kit.lora.adapter import adapter_tensors
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import optimizer_state, restore_optimizer

DYNAMIC_MAP = Copied((256,), torch.float32)
"""Double quant's table: one for all layers on CUDA, one for each where there are no values."""


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    ("family", "source"), [("llama_bias", torch.bfloat16), ("gemma3", torch.float32)]
)
def test_each_tensor_of_a_base_goes_up_once_as_in_its_file(
    family: str, bits: int, source: torch.dtype
) -> None:
    with accelerator() as card:
        base = card.open(saved(family, source), bits=bits)
        buffers = list(base.model.buffers())
        expected = [Copied((one.end - one.start,), torch.uint8) for one in base.plain.values()]
        with card.watch() as seen:
            model = fill(base, lambda entry, into: None)
        held = [*model.parameters(), *model.buffers()]
    assert {one.device for one in held} == {card.device}
    found = in_order(one for one in seen.copied_in if one != DYNAMIC_MAP)
    assert found == in_order([*expected, *copied(buffers)])
    assert seen.copied_out == []


def trained(card: Accelerator) -> tuple[Any, Any, torch.optim.Optimizer]:
    """A base whose adapters have taken a step; its model and optimizer."""
    base = card.open(saved("llama_bias"))
    with card.watch(may_read=True):
        fill(base, lambda entry, into: None)
    inject_lora(base.model, seed=0)
    optimizer = card.optimizer(base.model)
    batch = card.on_host(small_batch())
    with card.watch(may_read=True):
        train_step(base.model.train(), [batch], optimizer, step=1, max_grad_norm=1.0)
    return base, base.model, optimizer


def on_host(tensors: Sequence[Tensor]) -> bool:
    return {one.device.type for one in tensors} == {"cpu"}


def test_an_adapter_comes_down_once_in_its_dtype() -> None:
    with accelerator() as card:
        _, model, _ = trained(card)
        with card.watch(may_read=True) as seen:
            tensors = list(adapter_tensors(model).values())
    assert on_host(tensors)
    assert in_order(seen.copied_out) == copied(tensors)
    assert seen.copied_in == []


def test_the_states_of_an_optimizer_come_down_once_and_go_up_once() -> None:
    with accelerator() as card:
        _, model, optimizer = trained(card)
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        with card.watch(may_read=True) as seen:
            tensors, numbers = optimizer_state(optimizer, names)
        assert on_host(list(tensors.values()))
        assert in_order(seen.copied_out) == copied(tensors.values())
        resumed = card.optimizer(model)
        with card.watch() as seen:
            restore_optimizer(resumed, names, tensors, numbers)
        assert in_order(seen.copied_in) == copied(tensors.values())
        states = [one for state in resumed.state.values() for one in state.values()]
        assert {one.device for one in states} == {card.device}
        batch = card.on_host(small_batch())
        with card.watch() as seen:
            train_step(model, [batch], resumed, step=2, max_grad_norm=1.0)
    assert seen.copied_out == []


def test_an_export_makes_each_tensor_on_the_device_and_copies_none_up() -> None:
    with accelerator() as card:
        base, _, _ = trained(card)
        with card.watch(may_read=True) as seen, torch.no_grad():
            made = [(one, one.make().to("cpu", torch.bfloat16)) for one in export_tensors(base)]
    assert len(made) == len(base.entries)
    assert all(tensor.shape == one.shape for one, tensor in made)
    assert seen.copied_in == []
    assert in_order(seen.copied_out) == copied(tensor for _, tensor in made)

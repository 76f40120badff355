"""Paged optimizer states: in managed memory, saved from it, and back in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_kit.training.optimizer import (
    PAGED_FROM_ELEMENTS,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)

PAGED = ("paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit")


def parameters() -> dict[str, nn.Parameter]:
    """One whose states are paged, and one that is too small for that."""
    drawn = torch.Generator("cuda").manual_seed(0)
    shapes = {"large": (400, 400), "small": (30, 40)}
    assert shapes["large"][0] ** 2 >= PAGED_FROM_ELEMENTS
    return {
        name: nn.Parameter(torch.randn(shape, device="cuda", generator=drawn))
        for name, shape in shapes.items()
    }


def descend(own: dict[str, nn.Parameter], optimizer: Any, steps: int, seed: int = 0) -> None:
    drawn = torch.Generator("cuda").manual_seed(seed)
    for _ in range(steps):
        for parameter in own.values():
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=drawn)
        optimizer.step()


def named(own: dict[str, nn.Parameter]) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in own.items()}


@pytest.mark.parametrize("name", [*PAGED, "adamw", "adamw_8bit", "lion_8bit"])
def test_training_goes_on_from_saved_states_as_if_it_had_not_stopped(name: str) -> None:
    own = parameters()
    optimizer = make_optimizer(name, own.values(), 1e-2, weight_decay=0.1)
    descend(own, optimizer, 3)
    tensors, numbers = optimizer_state(optimizer, named(own))
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    saved = {key: tensor.clone() for key, tensor in tensors.items()}
    other = {key: nn.Parameter(value.detach().clone()) for key, value in own.items()}
    restored = make_optimizer(name, other.values(), 1e-2, weight_decay=0.1)
    restore_optimizer(restored, named(other), saved, numbers)
    for key in own:
        states = [optimizer.state[own[key]], restored.state[other[key]]]
        for part in states[0]:
            paged = [getattr(state[part], "is_paged", False) for state in states]
            assert paged[0] == paged[1], part
            expected = name in PAGED and key == "large" and part.startswith("state")
            assert paged[0] == expected, part
    descend(own, optimizer, 3, seed=1)
    descend(other, restored, 3, seed=1)
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_bitsandbytes_own_way_of_loading_unpages() -> None:
    """Ours is needed while `load_state_dict` copies managed memory into ordinary tensors."""
    own = parameters()
    optimizer = make_optimizer("paged_adamw_8bit", own.values(), 1e-2)
    descend(own, optimizer, 1)
    theirs = make_optimizer("paged_adamw_8bit", own.values(), 1e-2)
    theirs.load_state_dict(optimizer.state_dict())
    assert not getattr(theirs.state[own["large"]]["state1"], "is_paged", False)

"""Laws of the optimizers by name, their saved states, and the schedules."""

from __future__ import annotations

import math
import warnings

import bitsandbytes.optim as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.config.training import OPTIMIZERS, SCHEDULES, TrainingConfig
from qlora_kit.device.target import planned_device
from qlora_kit.errors import CheckpointError
from qlora_kit.training.optimizer import (
    learning_rates,
    make_optimizer,
    make_states,
    optimizer_names,
    optimizer_state,
    paging_note,
    restore_optimizer,
    state_bytes,
    warmup_steps,
)

CPU = torch.device("cpu")


def parameters():
    """One below and one above the size from which states are in 8 bits (4,096)."""
    torch.manual_seed(3)
    return {"small": nn.Parameter(torch.randn(7, 9)), "large": nn.Parameter(torch.randn(64, 80))}


def descend(own, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in own.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_against_the_gradient(name):
    own = parameters()
    start = {key: value.detach().clone() for key, value in own.items()}
    optimizer = make_optimizer(name, own.values(), 1e-2)
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, parameter in own.items():
        # Adam and Lion move every element by the rate in their first step, within 8-bit rounding.
        assert torch.allclose(start[key] - parameter, torch.tensor(1e-2), rtol=0.02), key
    assert (paging_note(name, own.values(), CPU) is not None) == name.startswith("paged")


def test_adamw_is_torchs_fused_one():
    """On the CPU it is a kernel, bitsandbytes' are passes of torch's operations."""
    optimizer = make_optimizer("adamw", parameters().values(), 1e-2)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "on_cuda", "on_cpu", "bits"),
    [
        ("adamw_8bit", bnb.AdamW8bit, bnb.AdamW8bit, 8),
        ("paged_adamw_8bit", bnb.PagedAdamW8bit, bnb.AdamW8bit, 8),
        ("paged_adamw_32bit", bnb.PagedAdamW32bit, bnb.AdamW32bit, 32),
        ("lion_8bit", bnb.Lion8bit, bnb.Lion8bit, 8),
        ("paged_lion_8bit", bnb.PagedLion8bit, bnb.Lion8bit, 8),
    ],
)
def test_the_others_are_bitsandbytes_own(name, on_cuda, on_cpu, bits):
    """Where paging does nothing but warn, the class without it."""
    with FakeTensorMode():
        planned = nn.Parameter(torch.empty(400, 400))
    with planned_device("cuda"):
        optimizer = make_optimizer(name, [planned], 1e-2)
    assert type(optimizer) is on_cuda
    assert optimizer.is_paged == name.startswith("paged")
    own = {"large": nn.Parameter(torch.zeros(400, 400))}
    if on_cpu is not on_cuda:
        with pytest.warns(UserWarning, match="not supported on CPU"):
            descend(own, on_cuda(own.values(), lr=1e-2), 1)
    optimizer = make_optimizer(name, own.values(), 1e-2, weight_decay=0.3)
    assert type(optimizer) is on_cpu
    assert optimizer.args.optim_bits == bits
    assert [(one["lr"], one["weight_decay"]) for one in optimizer.param_groups] == [(1e-2, 0.3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        descend(own, optimizer, 1)


@pytest.mark.filterwarnings("ignore:.*not supported on CPU")
@pytest.mark.parametrize("kind", [*OPTIMIZERS, bnb.PagedAdamW8bit, bnb.PagedLion8bit])
def test_states_made_before_the_first_step_change_nothing_and_none_is_made_in_it(kind):
    """Also where some are there already, as after resuming."""
    ends = []
    for made in (True, False):
        own = {"large": nn.Parameter(torch.ones(400, 400)), "small": nn.Parameter(torch.ones(9, 9))}
        if isinstance(kind, str):
            optimizer = make_optimizer(kind, own.values(), 1e-2)
        else:
            optimizer = kind(own.values(), lr=1e-2)
        descend({"small": own["small"]}, optimizer, 1)
        if made:
            make_states(optimizer)
            assert own["large"].eq(1).all()
            before = addresses(optimizer)
        descend(own, optimizer, 2)
        if made:
            assert addresses(optimizer) == before
        ends.append([parameter.detach().clone() for parameter in own.values()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def addresses(optimizer):
    """Where its states lie."""
    states = (value for one in optimizer.state.values() for value in one.values())
    return [value.data_ptr() for value in states if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_bit_for_bit(name):
    own = parameters()
    optimizer = make_optimizer(name, own.values(), 1e-2, weight_decay=0.1)
    descend(own, optimizer, 3)
    names = {parameter: key for key, parameter in own.items()}
    tensors, numbers = optimizer_state(optimizer, names)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    other = {key: nn.Parameter(value.detach().clone()) for key, value in own.items()}
    restored = make_optimizer(name, other.values(), 1e-2, weight_decay=0.1)
    restore_optimizer(restored, {p: key for key, p in other.items()}, tensors, numbers)
    descend(own, optimizer, 3, seed=1)
    descend(other, restored, 3, seed=1)
    assert all(torch.equal(own[key], other[key]) for key in own)
    for key in own:
        mine, theirs = optimizer.state[own[key]], restored.state[other[key]]
        assert mine.keys() == theirs.keys()
        for part, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == theirs[part].dtype, part
                assert torch.equal(value, theirs[part]), part
            else:
                assert value == theirs[part], part


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion_8bit"])
def test_states_are_saved_in_their_own_form(name):
    own = parameters()
    optimizer = make_optimizer(name, own.values(), 1e-2)
    descend(own, optimizer, 1)
    tensors, _ = optimizer_state(optimizer, {parameter: key for key, parameter in own.items()})
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    elements = sum(parameter.numel() for parameter in own.values())
    assert held <= state_bytes(name) * elements + 64
    eight = {key for key, tensor in tensors.items() if tensor.dtype is torch.uint8}
    states = {"adamw": 0, "adamw_8bit": 2, "lion_8bit": 1}[name]
    assert eight == {f"large.state{i + 1}" for i in range(states)}
    # The tables of 8-bit values are bitsandbytes' own constants.
    assert not any("qmap" in key for key in tensors)


def test_states_of_another_optimizer_are_refused_and_change_nothing():
    own = parameters()
    names = {parameter: key for key, parameter in own.items()}
    saved = {}
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, own.values(), 1e-2)
        descend(own, optimizer, 1)
        saved[name] = optimizer_state(optimizer, names)
    for name, other in (
        ("adamw", "adamw_8bit"),
        ("adamw_8bit", "lion_8bit"),
        ("lion_8bit", "adamw"),
    ):
        fresh = make_optimizer(name, own.values(), 1e-2)
        with pytest.raises(CheckpointError, match="optimizer state"):
            restore_optimizer(fresh, names, *saved[other])
        assert not fresh.state
    tensors, numbers = saved["adamw"]
    short = {key: tensor[:1] if tensor.dim() else tensor for key, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="optimizer state"):
        restore_optimizer(make_optimizer("adamw", own.values(), 1e-2), names, short, numbers)


def test_names():
    assert optimizer_names("auto", CPU) == ("adamw",)
    assert optimizer_names("auto", torch.device("cuda")) == ("adamw", "paged_adamw_8bit")
    assert optimizer_names("lion_8bit", torch.device("cuda")) == ("lion_8bit",)
    small = parameters().values()
    assert "pages nothing" in paging_note("paged_adamw_8bit", small, torch.device("cuda"))
    large = [nn.Parameter(torch.zeros(400, 400))]
    assert paging_note("paged_adamw_8bit", large, torch.device("cuda")) is None


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.1, 5, 100])
def test_schedules_warm_up_and_go_down(schedule, warmup):
    """Against transformers' own schedules, which count from 0 and begin at rate 0."""
    from transformers import get_scheduler

    config = TrainingConfig(learning_rate=3e-3, lr_scheduler_type=schedule, warmup_steps=warmup)
    total = 50
    rates = [learning_rates(config, total)(step) for step in range(1, total + 1)]
    steps = warmup_steps(config, total)
    assert steps == {0: 0, 0.1: 5, 5: 5, 100: 100}[warmup]
    assert all(0 < rate <= 3e-3 for rate in rates)
    for index in range(min(steps, total)):
        assert rates[index] == pytest.approx(3e-3 * (index + 1) / steps)
    if steps >= total:
        return
    assert rates[steps] == 3e-3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 3e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, steps, total)
    # After the warm-up both go down over the same number of steps from the same rate.
    for _ in range(steps):
        optimizer.step()
        theirs.step()
    for rate in rates[steps:]:
        assert rate == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_the_last_step_of_a_cosine_still_trains():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=0)
    rates = [learning_rates(config, 10)(step) for step in range(1, 11)]
    assert rates == [pytest.approx(0.5 * (1 + math.cos(math.pi * i / 10))) for i in range(10)]
    assert rates[-1] > 0.02

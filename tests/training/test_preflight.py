"""Laws of the preflight: it changes nothing, and it meets what the run will meet."""

from __future__ import annotations

import pytest
import torch
from capped_device import CappedDevice
from micro_batches import ragged_rows, trained

from qlora_kit.data.schedule import StepSchedule
from qlora_kit.errors import ResourceError
from qlora_kit.training.guard import Guard
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer, make_states
from qlora_kit.training.preflight import is_due, preflight


def schedule_of(rows):
    return StepSchedule(rows=rows, batch_size=2, accumulation=3, num_steps=6, seed=3)


def largest(rows):
    schedule = schedule_of(rows)
    return schedule.collate(schedule.largest().sequences)


def run(model, optim, rows, tried):
    ours = model(dropout=0.3, r=16)
    guard = Guard(ours)
    optimizer = make_optimizer(optim, ours.parameters(), 1e-2)
    torch.manual_seed(11)
    state, before = torch.get_rng_state(), guard.state()
    if tried:
        batch = largest(rows)
        preflight(ours, optimizer, batch, guard, accumulates=True)
        assert not optimizer.state
        assert all(parameter.grad is None for parameter in ours.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert (guard.state(), guard.bad_in_a_row) == (before, 0)
        assert {m._position for m in ours.modules() if hasattr(m, "seek")} == {(0, 0)}
        assert not ours.training
    history = train(
        ours,
        schedule_of(rows),
        optimizer,
        run_backward=guard.run_backward,
        before_step=guard.before_step,
    )
    return trained(ours), [one.loss for one in history]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_run_is_the_same_bit_for_bit_with_and_without_it(model, optim):
    """Six steps of three micro-batches with dropout, over two epochs."""
    rows = ragged_rows(20)
    (ours, losses), (plain, plain_losses) = (run(model, optim, rows, on) for on in (True, False))
    assert losses == plain_losses
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


def full_above(ours, rows):
    """A layer that asks for more than there is where it sees more rows at once."""

    def look(module, args):
        if args[0].shape[0] > rows:
            torch.empty(2**55, dtype=torch.uint8)

    ours.model.layers[1].register_forward_pre_hook(look)


def test_where_half_fits_the_run_goes_on_with_half(model):
    ours, notes = model(), []
    full_above(ours, 1)
    guard = Guard(ours, note=notes.append)
    optimizer = make_optimizer("adamw", ours.parameters(), 1e-2)
    rows = ragged_rows(8)
    batch = largest(rows)
    preflight(ours, optimizer, batch, guard, accumulates=False)
    assert guard.max_rows == 1
    assert [note.partition(":")[0] for note in notes] == ["out of memory with 2 rows at a time"]
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_one_row_that_does_not_fit_is_refused_with_plan_and_ways_out(model):
    ours = model()
    full_above(ours, 0)
    guard = Guard(ours)
    guard.planned_bytes = 123456789
    optimizer = make_optimizer("adamw", ours.parameters(), 1e-2)
    rows = ragged_rows(8)
    batch = largest(rows)
    with pytest.raises(ResourceError) as error:
        preflight(ours, optimizer, batch, guard, accumulates=True)
    for part in ("123456789 bytes planned", "bytes free", "--max_length", "full", "--bits 4"):
        assert part in str(error.value), part
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_what_an_attempt_held_is_gone_before_anything_is_tried_again(model):
    """To the byte, in forward and in backward: no frame of the error keeps a tensor."""
    ours, found = model(recompute="none"), []
    optimizer = make_optimizer("adamw", ours.parameters(), 1e-2)
    make_states(optimizer)
    batch = largest(ragged_rows(8))
    with CappedDevice(2**60) as device:
        preflight(ours, optimizer, batch, Guard(ours), accumulates=True)
        before, takes = device.current, device.peak - device.current

        def make_room(missing):
            found.append(device.current)
            device.capacity = 2**60
            return 0

        for share in (0.3, 0.95):
            device.capacity = before + int(share * takes)
            guard = Guard(ours, recompute_more=make_room)
            preflight(ours, optimizer, batch, guard, accumulates=True)
            assert guard.max_rows is None
    assert found == [before, before]


def test_on_the_cpu_it_is_due_near_the_budget_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert is_due(cuda, 1, 1000)
    assert not is_due(cpu, 899, 1000)
    assert is_due(cpu, 901, 1000)
    assert not is_due(cpu, 901, None)

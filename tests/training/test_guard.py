"""Laws of the guard: what it refuses, what it leaves as it was, how it makes batches smaller."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from micro_batches import micro_batches, ragged_rows, trained

from qlora_kit.data.batch import collate
from qlora_kit.errors import NumericError, ResourceError
from qlora_kit.process.out_of_memory import is_out_of_memory
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.training.guard import Guard
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer


def states(optimizer):
    return [
        {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in s.items()
        }
        for s in optimizer.state.values()
    ]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_element_that_is_not_finite_stops_before_the_optimizer(model, optim, value):
    """Three times in a row: parameters and states are equal bit for bit."""
    ours, notes = model(r=64), []
    guard = Guard(ours, note=notes.append, rows_of=lambda step: f"rows of {step}")
    optimizer = make_optimizer(optim, ours.parameters(), 1e-2)
    train(
        ours,
        micro_batches(1),
        optimizer,
        run_backward=guard.run_backward,
        before_step=guard.before_step,
    )
    before, before_states = trained(ours), states(optimizer)
    name, poisoned = [p for p in ours.named_parameters() if p[1].requires_grad][3]

    def poison(grad):
        grad = grad.clone()
        grad.view(-1)[7] = value
        return grad

    poisoned.register_hook(poison)
    with pytest.raises(NumericError) as error:
        train(
            ours,
            micro_batches(5),
            optimizer,
            run_backward=guard.run_backward,
            before_step=guard.before_step,
        )
    assert "step 3" in error.value.problem
    assert f"the gradient of {name}" in error.value.problem
    assert "rows of 3" in error.value.problem
    assert [note.split(":")[0] for note in notes] == ["step 1", "step 2"]
    assert all(torch.equal(before[key], tensor) for key, tensor in trained(ours).items())
    for old, new in zip(before_states, states(optimizer), strict=True):
        for key, kept in old.items():
            same = (
                torch.equal(kept, new[key]) if isinstance(kept, torch.Tensor) else kept == new[key]
            )
            assert same, key


def test_a_bad_step_is_skipped_where_there_is_no_memory_to_look_into_it(model):
    ours, notes = model(), []
    guard = Guard(ours, note=notes.append)
    guard.run_backward(lambda parts: torch.zeros(()), micro_batches(1)[0])

    def full(module, args):
        torch.empty(2**55, dtype=torch.uint8)

    ours.model.layers[1].register_forward_pre_hook(full)
    assert not guard.before_step(1, float("nan"), 1.0)
    assert "no memory to look for, rows unknown: skipped" in notes[0]


def test_adapters_that_no_gradient_reaches_are_an_error(model):
    """One layer is cut off from the loss; the message names its adapters."""
    ours = model(recompute=None)  # our block would not call the hook
    ours.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: output.detach()
    )
    guard = Guard(ours)
    optimizer = make_optimizer("adamw", ours.parameters(), 1e-2)
    with pytest.raises(
        NumericError, match=r"no gradient reaches 1 adapters .*layers\.0\.\S*v_proj"
    ):
        train(
            ours,
            micro_batches(1),
            optimizer,
            run_backward=guard.run_backward,
            before_step=guard.before_step,
        )
    assert not optimizer.state


def test_smaller_micro_batches_are_those_of_their_rows(model):
    """As if their rows had been collated so: no wider than they have to be."""
    rows, seen = ragged_rows(7), []
    guard = Guard(model())
    guard.max_rows = 3

    def backward(micro_batches):
        seen.extend(micro_batches)
        return torch.zeros(())

    guard.run_backward(backward, [collate(rows, 0)])
    for part, own in zip(seen, (rows[:3], rows[3:6], rows[6:]), strict=True):
        for key, value in collate(own, 0).items():
            same = torch.equal(part[key], value) if torch.is_tensor(value) else part[key] == value
            assert same, key


def test_a_full_device_halves_until_it_fits_and_stays_there(model):
    ours, notes, tried = model(), [], []
    guard = Guard(ours, note=notes.append)

    def gradients(micro_batches):
        tried.append([len(batch["lengths"]) for batch in micro_batches])
        if max(tried[-1]) > 2:
            torch.empty(2**55, dtype=torch.uint8)
        return torch.zeros(())

    rows = [collate(ragged_rows(7), 0)]
    guard.run_backward(gradients, rows)
    guard.run_backward(gradients, rows)
    assert tried == [[7], [4, 3], [2, 2, 2, 1], [2, 2, 2, 1]]
    assert [note.split(":")[0] for note in notes] == [
        "out of memory with 7 rows at a time",
        "out of memory with 4 rows at a time",
    ]
    assert guard.max_rows == 2

    def hopeless(micro_batches):
        raise MemoryError

    with pytest.raises(ResourceError, match="one row of 32 tokens"):
        guard.run_backward(hopeless, rows)


def test_only_a_full_device_is_taken_for_one():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(error.value)


def test_other_errors_pass_through(model):
    def broken(micro_batches):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Guard(model()).run_backward(broken, micro_batches(1)[0])


def test_a_signal_waits_between_steps_and_raises_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    # Whoever began this process may have it ignored, as a shell does for what runs behind it.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as signals, signals.between_steps():
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            signals.raise_if_received()
        assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignals(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, ignored)
    assert stopped.value.exit_code == 130


def test_after_the_grace_a_droppable_part_is_left():
    with StopSignals(grace_s=0.05) as signals, signals.between_steps():
        signal.raise_signal(signal.SIGTERM)
        began = time.monotonic()
        while time.monotonic() - began < 0.2:  # not droppable: nothing happens
            time.sleep(0.01)
        with pytest.raises(Stopped), signals.droppable():
            _sleep_and_fail()


def _sleep_and_fail():
    time.sleep(60)
    pytest.fail("it was not left")

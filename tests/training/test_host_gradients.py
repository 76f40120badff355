"""Laws of gradients that wait on the host: the same bits, also where a step is taken again."""

from __future__ import annotations

import pytest
import torch
from adapted import adapted_model
from families import token_ids

from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.training.gradients import keep_gradients_in
from qlora_kit.training.guard import Guard
from qlora_kit.training.host_gradients import Waiting, stop_waiting, wait_on_host, waiting_of
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer


def batches():
    rows = [token_ids(1, 12 + number, seed=number)[0].tolist() for number in range(6)]
    return [collate([Encoded(row, row) for row in rows[at : at + 2]], 0) for at in (0, 2, 4)]


def trained(dtype, waits, fails=False):
    """Parameters and reports after two steps of three micro-batches."""
    model = adapted_model("llama3", bits=4, targets="all-linear", dropout=0.1)
    keep_gradients_in(dtype, model.parameters())
    if waits:
        wait_on_host(model.parameters(), anywhere=True)
    optimizer = make_optimizer("adamw", model.parameters(), 1e-2)
    guard, failed = Guard(model, recompute_more=lambda missing: 1), []

    def backward(run, parts):
        def once(parts):
            if fails and not failed:
                failed.append(run(parts[:2]))
                raise MemoryError
            return run(parts)

        return guard.run_backward(once, parts)

    reports = train(model, [batches()] * 2, optimizer, run_backward=backward)
    found = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters())
    return found, [(one.loss, one.grad_norm) for one in reports], model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_are_the_same_bits(dtype, fails):
    """Also where memory ends in the middle of a step, and what was there is forgotten."""
    expected, reports, _ = trained(dtype, waits=False)
    found, ours, _ = trained(dtype, waits=True, fails=fails)
    assert ours == reports
    assert all(map(torch.equal, found, expected))


def test_a_device_that_is_full_as_they_come_back_is_met(monkeypatch):
    """The step is taken again: of those that had come back none is added twice, and none lost."""
    come_back, came = Waiting.come_back, []

    def full_at_the_third(waiting, parameter):
        came.append(parameter)
        if len(came) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        come_back(waiting, parameter)

    expected, reports, _ = trained("fp32", waits=False)
    monkeypatch.setattr(Waiting, "come_back", full_at_the_third)
    found, ours, _ = trained("fp32", waits=True)
    assert came[3:6] == came[:3]
    assert ours == reports
    assert all(map(torch.equal, found, expected))


def test_during_the_passes_the_device_has_none():
    _, _, model = trained("fp32", waits=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=token_ids(1, 8)).logits.sum().backward()
    assert all(p.grad is None and waiting_of(p).is_there for p in weights)
    stop_waiting(weights)
    model(input_ids=token_ids(1, 8)).logits.sum().backward()
    assert all(p.grad is not None and waiting_of(p) is None for p in weights)

"""Laws of the factor of an fp16 loss: it changes no number, and what overflows is taken again."""

from __future__ import annotations

import json
import math

import pytest
import torch
from micro_batches import micro_batches, trained

from qlora_kit.errors import NumericError
from qlora_kit.training.guard import Guard
from qlora_kit.training.loop import train
from qlora_kit.training.loss_scale import FIRST, GOOD_STEPS, LEAST, MOST, LossScale
from qlora_kit.training.optimizer import make_optimizer

STEPS = 4


class Fp16Run:
    """A tiny model in fp16 with its guard, its optimizer, and the reports of its steps."""

    def __init__(self, model, *, first=FIRST, most=MOST, dtype="fp16", overflows=None):
        self.model, self.notes = model(dtype=dtype, dropout=0.3), []
        self.guard = Guard(self.model, note=self.notes.append)
        self.guard.loss_scale = LossScale(
            self.model.dtype, self.notes.append, first=first, most=most
        )
        self.optimizer = make_optimizer("adamw", self.model.parameters(), 1e-2)
        self.reports = []
        if overflows is not None:
            poisoned = next(p for p in self.model.parameters() if p.requires_grad)
            poisoned.register_hook(lambda grad: grad * math.inf if overflows(self) else grad)

    def steps(self, first=1, last=STEPS, batches=None):
        self.reports += train(
            self.model,
            (batches or micro_batches(STEPS))[first - 1 : last],
            self.optimizer,
            run_backward=self.guard.run_backward,
            before_step=self.guard.before_step,
            loss_scale=self.guard.loss_scale,
            start_step=first - 1,
        )
        return self


def assert_same(ours, other, rtol=0.0):
    for name, tensor in trained(ours.model).items():
        torch.testing.assert_close(tensor, trained(other.model)[name], rtol=rtol, atol=rtol)


def test_gradients_that_overflow_are_made_again_with_half_the_factor(model):
    """For real, from a factor no fp16 gradient lives with: as if the run had begun lower."""
    high = Fp16Run(model, first=2.0**40, most=2.0**40).steps()
    found = [report.loss_scale for report in high.reports]
    assert found == sorted(found, reverse=True)
    assert LEAST < found[-1] <= found[0] < 2.0**40
    assert len(high.notes) == math.log2(2.0**40 / found[-1])
    first = [note for note in high.notes if note.startswith("step 1: loss ")]
    assert first[-1].endswith(f"{2 * found[0]:g}: the step is taken again at {found[0]:g}")
    low = Fp16Run(model, first=found[0], most=2.0**40).steps()
    assert_same(high, low)
    assert high.reports[-1].loss == low.reports[-1].loss
    assert len(low.notes) == math.log2(found[0] / found[-1])


def test_an_overflow_in_the_middle_changes_no_more_than_the_factor_does(model):
    """Step 3 overflows above 256. Factors are powers of two: only what fp16 has no number for."""

    def overflows(run):
        states = list(run.optimizer.state.values())
        return bool(states) and states[0]["step"] == 2 and run.guard.loss_scale.value > 256

    again = Fp16Run(model, overflows=overflows).steps()
    assert [report.loss_scale for report in again.reports] == [FIRST, FIRST, 256, 256]
    assert [note.partition(":")[0] for note in again.notes] == ["step 3", "step 3"]
    assert_same(again, Fp16Run(model, first=256.0).steps(), rtol=1e-3)


def test_a_run_goes_on_with_the_factor_that_it_had(model):
    """Bit for bit, through JSON; what was saved before there was a factor begins with the first."""
    whole, parts = (
        Fp16Run(model, overflows=lambda run: run.guard.loss_scale.value > 128) for _ in range(2)
    )
    whole.steps()
    parts.steps(last=2)
    state = json.loads(json.dumps(parts.guard.state()))
    assert (state["loss_scale"], state["good_steps"]) == (128, 2)
    parts.guard = Guard(parts.model)
    parts.guard.restore(state)
    parts.steps(first=3)
    assert_same(parts, whole)
    assert parts.guard.state() == whole.guard.state()
    parts.guard.restore({"bad_in_a_row": 0, "max_rows": None})
    assert parts.guard.loss_scale.value == 128
    for wrong in ({"loss_scale": 3.0}, {"loss_scale": True}, {"good_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            parts.guard.restore({**state, **wrong})


def test_gradients_that_no_factor_makes_finite_are_a_bad_step(model):
    run = Fp16Run(model, overflows=lambda run: True)
    with pytest.raises(NumericError, match="3 such steps in a row"):
        run.steps()
    assert run.guard.loss_scale.value == FIRST  # the next step is not to suffer
    skipped = [note for note in run.notes if "skipped" in note]
    assert [note.partition(":")[0] for note in skipped] == ["step 1", "step 2"]
    assert len(run.notes) == 2 + 3 * math.log2(FIRST / LEAST)
    assert not run.optimizer.state


def test_the_factor_doubles_after_many_good_steps_up_to_its_bound():
    scale, seen = LossScale(torch.float16), set()
    for _ in range(9 * GOOD_STEPS):
        scale.took_step()
        seen.add(scale.value)
    assert sorted(seen) == [FIRST * 2**power for power in range(7)]
    assert max(seen) == MOST
    for _ in range(GOOD_STEPS - 1):
        scale.took_step()
    assert scale.overflowed(1, 1.0)
    assert (scale.value, scale.good_steps) == (MOST / 2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_no_factor(dtype):
    scale = LossScale(dtype, first=64.0)
    for _ in range(2 * GOOD_STEPS):
        scale.took_step()
    assert not scale.overflowed(1, 1.0)
    assert (scale.value, scale.state()) == (1.0, {})


def test_a_run_in_fp16_learns_what_it_learns_in_fp32(model):
    """Losses differed by 1.7e-4 of themselves at most, where fp16 rounds numbers by 5e-4."""
    same = micro_batches(1) * 15
    half, single = (
        Fp16Run(model, dtype=dtype).steps(last=15, batches=same) for dtype in ("fp16", "fp32")
    )
    assert half.reports[-1].loss < half.reports[0].loss - 0.1
    for ours, theirs in zip(half.reports, single.reports, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-4)
    assert {report.loss_scale for report in single.reports} == {None}

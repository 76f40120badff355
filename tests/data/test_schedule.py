"""The largest batch without building one, against building them all."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_batches import ragged_rows

from qlora_kit.data.batch import lengths_of
from qlora_kit.data.order import make_packs
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.tokens import Encoded


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 50),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    num_steps=st.integers(1, 25),
    start=st.integers(0, 24),
    order=st.sampled_from(["random", "grouped", "packed"]),
)
def test_no_batch_of_the_run_is_larger(
    count, seed, batch_size, accumulation, num_steps, start, order
):
    rows = ragged_rows(count, seed)
    packs = make_packs(lengths_of(rows), 64, seed) if order == "packed" else None
    schedule = StepSchedule(
        rows=rows,
        batch_size=batch_size,
        accumulation=accumulation,
        num_steps=num_steps,
        seed=seed,
        start_step=start,
        packs=packs,
        group_by_length=order == "grouped",
    )
    steps = list(schedule)
    found = schedule.largest()
    assert len(steps) == len(schedule)
    if not steps:
        assert found is None
        return
    sizes = [
        (batch["input_ids"].numel(), batch["num_supervised"])
        for micro_batches in steps
        for batch in micro_batches
    ]
    ours = schedule.collate(found.sequences)
    assert ours["input_ids"].numel() == max(sizes)[0]
    # It is a batch of the step that it names.
    named = steps[found.step - 1 - start]
    assert any(np.array_equal(ours["input_ids"], batch["input_ids"]) for batch in named)
    if len(steps) <= schedule.steps_per_epoch - start:  # one epoch
        assert (ours["input_ids"].numel(), ours["num_supervised"]) == max(sizes)


def test_of_equal_batches_the_most_supervised_one():
    rows = [Encoded([3] * 8, [-100] * (8 - n) + [3] * n) for n in (2, 5, 3, 1)]
    schedule = StepSchedule(rows=rows, batch_size=1, accumulation=4, num_steps=1, seed=0)
    assert schedule.largest().sequences == [[1]]

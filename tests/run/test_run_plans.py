"""A law of the micro-batches that a run is planned by."""

from __future__ import annotations

import pytest

from qlora_kit.data.batch import lengths_of
from qlora_kit.data.order import make_packs
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.tokens import Encoded
from qlora_kit.run.plans import _largest_shapes


@pytest.mark.parametrize("lengths", [[64, 70, 58], [64, 60, 4, 60, 4]])
def test_no_row_of_a_batch_of_packs_is_longer_than_planned(lengths):
    """One that is alone in its pack goes on through the padding, beside packs of several."""
    rows = [Encoded([1] * length, [1] * length) for length in lengths]
    packs = make_packs(lengths_of(rows), 128, 0)
    schedule = StepSchedule(rows=rows, batch_size=3, num_steps=1, seed=0, packs=packs)
    (batch,) = next(iter(schedule))
    assert batch["packed"]
    longest = max(length for within in batch["row_lengths"] for length in within)
    shape, _ = next(_largest_shapes(schedule))
    assert longest <= shape.longest_row

"""Plans of a training run, of the largest micro-batches of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from qlora_kit.base.base import Base
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import Placement
from qlora_kit.data.batch import lengths_of
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.device.found import card_of, free_bytes
from qlora_kit.plan.longest import longest_rows
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.micro_batch import fastest_rows
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.step_time import Clock


class RunPlans:
    """Plans of a run whose options are resolved; `rank` is the largest of its adapters.

    They are those of the largest micro-batches of its steps, every token trained on. Beside what is
    free on the host they may take `held_bytes` there, which this run has already.
    """

    def __init__(
        self,
        config: RunConfig,
        base: Base,
        schedule: StepSchedule,
        rank: int,
        clock: Clock | None = None,
        held_bytes: int = 0,
    ) -> None:
        if clock is None and (card := card_of(base.device)) is not None:
            clock = Clock(card)
        self._planner = Planner(
            config.base,
            replace(config.lora, r=rank),
            config.training,
            opened=base,
            clock=clock,
            host_bytes=free_bytes(torch.device("cpu")) + held_bytes,
        )
        self.schedule = schedule

    def within(
        self,
        budget_bytes: int,
        optim: str | None = None,
        placements: Sequence[Placement] | None = None,
    ) -> MemoryPlan:
        """The plan that is fastest of those that fit; the one that takes least where none does.

        Optimizer and placement are those given, else the first of those that the options allow with
        which all of it fits.
        """
        shapes = tuple(_largest_shapes(self.schedule))
        plans = self._planner.plans(shapes, None, budget_bytes, optim, placements)
        plan = max(plans, key=lambda one: (one.recomputed, one.peak_bytes))
        return replace(plan, tokens=max(one.tokens for one in plans))

    def take_fastest(self, budget_bytes: int) -> None:
        """Have the micro-batches that make the steps in the least time, where the card is known."""
        whole = self.schedule

        def plan_of(rows: int) -> MemoryPlan:
            self.schedule = whole.in_batches_of(rows)
            return self.within(budget_bytes)

        def seconds_of(rows: int, plan: MemoryPlan) -> float:
            # A step is as long as its mean micro-batch, padding included, and not as the largest.
            width, packed = self.schedule.mean_width(), whole.packs is not None
            shape = BatchShape(rows, max(2, width), width, packed)
            time = self._planner.time(shape, plan, self.schedule.accumulation)
            assert time is not None
            return time.total_s

        if self._planner.clock is not None:
            step_rows = whole.batch_size * whole.accumulation
            self.schedule = whole.in_batches_of(fastest_rows(step_rows, plan_of, seconds_of))

    def fitting_length(self, plan: MemoryPlan) -> int | None:
        """The longest rows that fit where those of this plan do not; None where none do."""
        shape, steps = next(_largest_shapes(self.schedule))
        level = self._planner.training.gradient_checkpointing
        assert plan.budget_bytes is not None
        where, room = plan.placement, plan.budget_bytes
        found = longest_rows(self._planner, shape, level, room, where, steps, shape.length)
        return found.tokens or None


def _largest_shapes(schedule: StepSchedule) -> Iterator[tuple[BatchShape, int]]:
    """The micro-batches that may take the most, with the number of them in a step.

    Among packs that is also the largest without any row beside another one: attention then takes
    all sequences at once.
    """
    lengths, packed = lengths_of(schedule.rows), schedule.packs is not None
    steps = min(schedule.accumulation, -(-schedule.num_sequences // schedule.batch_size))
    largest = schedule.largest()
    assert largest is not None  # a run has steps
    # Of a pair the longer row, beside which the other one is padded.
    of_sequence = np.max if schedule.pairs else np.sum
    length = max(int(of_sequence(lengths[rows])) for rows in largest.sequences)
    longest, trained = int(lengths.max()), schedule.most_supervised(length)
    if len(largest.sequences) > 1 and schedule.has_single_rows():
        longest = length  # one that is alone in its pack goes on through the padding
    yield BatchShape(len(largest.sequences), length, trained, packed, longest), steps
    if alone := schedule.most_single_rows():
        yield BatchShape(alone, length, trained), steps

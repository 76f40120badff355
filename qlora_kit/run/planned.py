"""The memory plan of a training run: of its largest batch, on its device, within what is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qlora_kit.base.base import Base
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.run import RunConfig
from qlora_kit.data.batch import lengths_of
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.device.found import available_bytes, card_of
from qlora_kit.errors import ConfigError
from qlora_kit.memory.held import weight_bytes
from qlora_kit.plan.micro_batch import fastest_rows
from qlora_kit.plan.plan import BatchShape, MemoryPlan, Planner
from qlora_kit.plan.step_time import Clock


class RunPlans:
    """Plans of a run whose options are resolved; `rank` is the largest of its adapters.

    They are those of the largest micro-batches of its steps, every token trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        base: Base,
        schedule: StepSchedule,
        rank: int,
        clock: Clock | None = None,
    ) -> None:
        if clock is None and (card := card_of(base.device)) is not None:
            clock = Clock(card)
        self._planner = Planner(
            config.base,
            replace(config.lora, r=rank),
            config.training,
            opened=base,
            clock=clock,
        )
        self.schedule = schedule

    def within(self, budget_bytes: int, optim: str | None = None) -> MemoryPlan:
        """The plan that fits with the least recomputed; the one that takes least where none does.

        Its optimizer is `optim`, else the first of those that the options allow that fits.
        """
        for name in self._planner.optims if optim is None else (optim,):
            plans = [
                self._planner.plan(shape, None, budget_bytes, steps, name)
                for shape, steps in _largest_shapes(self.schedule)
            ]
            if all(one.fits for one in plans):
                break
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
            time = self._planner.time(shape, plan.levels, self.schedule.accumulation)
            assert time is not None
            return time.total_s

        if self._planner.clock is not None:
            step_rows = whole.batch_size * whole.accumulation
            self.schedule = whole.in_batches_of(fastest_rows(step_rows, plan_of, seconds_of))


def planned_run(
    config: RunConfig, base: Base, schedule: StepSchedule, rank: int
) -> tuple[StepSchedule, MemoryPlan]:
    """The plan of a run within its budget, or within what its device has free.

    It comes with the run's steps, in the micro-batches that were planned.

    Errors: `ConfigError` for a `--memory_budget` that `auto` cannot keep.
    """
    training = config.training
    budget = training.budget_bytes
    plans = RunPlans(config, base, schedule, rank)
    room = budget or available_bytes(base.device)
    if training.batch_size is None:
        plans.take_fastest(room)
    plan = plans.within(room)
    if budget is not None and not plan.fits and training.gradient_checkpointing == "auto":
        margin = f" and a margin of {plan.margin_bytes}" if plan.margin_bytes else ""
        raise ConfigError(
            f"memory_budget {training.memory_budget} is {plan.missing_bytes} bytes below what the "
            f"run takes with everything recomputed (peak of {plan.peak_bytes} in {plan.place}"
            f"{margin})",
            "raise it by that, or lower --max_length, --batch_size or --bits; "
            "`qlora-kit plan` with the same options names what would fit",
        )
    return plans.schedule, plan


def _largest_shapes(schedule: StepSchedule) -> Iterator[tuple[BatchShape, int]]:
    """The micro-batches that may take the most, with the number of them in a step.

    Among packs that is also the largest without any row beside another one: attention then takes
    all sequences at once.
    """
    lengths, packed = lengths_of(schedule.rows), schedule.packs is not None
    steps = min(schedule.accumulation, -(-schedule.num_sequences // schedule.batch_size))
    largest = schedule.largest()
    assert largest is not None  # a run has steps
    length = max(int(lengths[rows].sum()) for rows in largest.sequences)
    longest, trained = int(lengths.max()), schedule.most_supervised(length)
    yield BatchShape(len(largest.sequences), length, trained, packed, longest), steps
    if alone := schedule.most_single_rows():
        yield BatchShape(alone, length, trained), steps


def measured_bits(config: RunConfig) -> dict[int, dict[str, int]]:
    """Load the base in 16, 8 and 4 bits one after another; bytes by component of each."""
    measured, base = {}, config.base
    for bits in (16, 8, 4):
        skip, head = (None, 16) if bits == 16 else (base.skip_modules, base.head_bits)
        other = replace(
            base, bits=bits, quant_type=None, double_quant=None, skip_modules=skip, head_bits=head
        )
        kept = replace(other, base_cache=base.base_cache and bits == base.bits)
        measured[bits] = weight_bytes(read_weights(open_base(kept)))
    return measured

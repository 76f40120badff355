"""What a run will take: its own loading and its own step, on fake tensors, before a byte is read.

    planner = Planner(BaseConfig("llama-7b"), LoRAConfig(), TrainingConfig())
    plan = planner.plan(BatchShape(rows=1, length=1024, supervised=1024))

There is no formula beside the code that trains: `plan/fake_model.py` loads the model and
`plan/fake_run.py` steps it, with the run's own code on fake tensors, while a counter adds up what
is allocated. Only what lies outside tensors is a table (`device/found.py`). `auto` takes the
levels of recompute from `plan/levels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.device.found import OVERHEADS, Overhead
from qlora_kit.memory.counter import Interval
from qlora_kit.plan.choose import choose
from qlora_kit.plan.fake_runs import FakeRuns
from qlora_kit.plan.levels import Chosen, choose_levels, traced_at
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.step_time import Clock, StepTime
from qlora_kit.plan.sum_up import sum_up


class Planner:
    """Plans of one base, its adapters and its optimizer, for any micro-batch and any levels.

    Of a base that a run has `opened` no file is opened again. With a `clock` plans say the time of
    a step, and `auto` goes by it. `host_bytes` are what a run may take of the host, where that is
    known: what takes more beside a card does not fit, and a base that does is streamed from files.

    Errors of the constructor: `ConfigError`, `ModelError`, `UnsafeInputError`, `ResourceError`.
    """

    def __init__(
        self,
        base: BaseConfig,
        lora: LoRAConfig,
        training: TrainingConfig,
        device: str | None = None,
        *,
        opened: Base | None = None,
        clock: Clock | None = None,
        host_bytes: int | None = None,
    ) -> None:
        capability = None if clock is None else clock.capability
        self._runs = FakeRuns(base, lora, training, device, opened, capability, host_bytes)
        self.device, self.clock, self.training = self._runs.device.type, clock, training
        self.placements = self._runs.placements
        self.host_bytes = host_bytes if self._runs.own_memory else None
        self.room = host_bytes
        self._made: dict[Any, MemoryPlan] = {}
        self._traced: dict[Any, dict[tuple[str, ...], Chosen]] = {}
        shape = self._runs.base
        warnings = () if shape.warning is None else (shape.warning,)
        self.notes = (*shape.notes, *warnings, *self._runs.notes)
        self.model = shape.model
        self.left, self.in_16_bits = shape.left, shape.in_16_bits
        self.run = self._runs.of(self.placements[0])
        self.optims = self.run.optims

    def plan(
        self,
        shape: BatchShape,
        level: str | None = None,
        budget_bytes: int | None = None,
        micro_steps: int | None = None,
        optim: str | None = None,
        placement: Placement | None = None,
    ) -> MemoryPlan:
        """The plan of a shape; `auto` takes the fastest levels that fit into the budget.

        `level` and the `micro_steps` of a step are those of the options unless given; `optim` and
        `placement` too, of which `choose.py` says what is taken of several.
        """
        steps = micro_steps or self.training.gradient_accumulation_steps
        placements = None if placement is None else (placement,)
        return self.plans([(shape, steps)], level, budget_bytes, optim, placements)[0]

    def plans(
        self,
        shapes: Sequence[tuple[BatchShape, int]],
        level: str | None = None,
        budget_bytes: int | None = None,
        optim: str | None = None,
        placements: Sequence[Placement] | None = None,
    ) -> list[MemoryPlan]:
        """As `plan`, of several shapes of one run, each with the micro-batches of its step.

        They have one placement and one optimizer.
        """
        asked = level or self.training.gradient_checkpointing
        optims = self.optims if optim is None else (optim,)

        def plans_of(where: Placement, name: str) -> list[MemoryPlan]:
            return [
                self._planned(where, name, shape, asked, budget_bytes, steps)
                for shape, steps in shapes
            ]

        places = self.placements if placements is None else self._runs.possible(placements)
        return choose(places, optims, plans_of, _cost, asked == "auto")

    def _planned(
        self,
        where: Placement,
        name: str,
        shape: BatchShape,
        level: str,
        budget_bytes: int | None,
        micro_steps: int,
    ) -> MemoryPlan:
        key = where, name, shape, level, budget_bytes, micro_steps
        if key not in self._made:
            self._take(where, name)
            plan = self._plan(shape, level, budget_bytes, micro_steps)
            why = self._why(name, plan)
            does = self._runs.in_effect(where, plan.levels)
            self._made[key] = replace(
                plan,
                optim=name,
                why_optim=why,
                placement=where,
                in_effect=does,
                in_files=self.run.in_files,
            )
        return self._made[key]

    def _take(self, placement: Placement, optim: str) -> None:
        """Have the fake run whose tensors lie where this says, with this optimizer."""
        self.run = self._runs.of(placement)
        self.run.take_optimizer(optim)

    def _why(self, optim: str, plan: MemoryPlan) -> str:
        """Why `auto` takes this optimizer, where it may take another."""
        if len(self.optims) == 1:
            return ""
        if optim == self.optims[0]:
            return "auto: no budget is given" if plan.budget_bytes is None else "auto: it fits"
        return f"auto: {self.optims[0]} does not fit"

    def _plan(
        self, shape: BatchShape, level: str, budget_bytes: int | None, micro_steps: int
    ) -> MemoryPlan:
        batches, known = self._batches(shape, micro_steps), self._known(shape, micro_steps)
        if level == "auto":
            budget = None if budget_bytes is None else self.overhead.room(budget_bytes)
            chosen = choose_levels(self.run, batches, budget, self.clock, known, self.host_bytes)
        else:
            levels = (level,) * len(self.run.layers)
            chosen = traced_at(self.run, batches, levels, known)
        tokens = batches[-1]["input_ids"].numel()
        plan = sum_up(self.run, chosen, shape, tokens, self.overhead, budget_bytes)
        time = self._timed(chosen.intervals, micro_steps, tokens)
        return replace(plan, time=time, host_budget_bytes=self.host_bytes)

    def time(self, shape: BatchShape, plan: MemoryPlan, micro_steps: int) -> StepTime | None:
        """What a step of such micro-batches takes, run as a plan says, where there is a clock."""
        self._take(plan.placement, plan.optim)
        batches = self._batches(shape, micro_steps)
        known = self._known(shape, micro_steps)
        passes = traced_at(self.run, batches, plan.levels, known).intervals
        return self._timed(passes, micro_steps, batches[-1]["input_ids"].numel())

    def _known(self, shape: BatchShape, micro_steps: int) -> dict[tuple[str, ...], Chosen]:
        """What was traced of such micro-batches, by levels."""
        key = self.run.placement, self.run.optim, shape, micro_steps
        return self._traced.setdefault(key, {})

    def _batches(self, shape: BatchShape, micro_steps: int) -> Any:
        self.run.packed, self.run.longest_row = shape.packed, shape.longest_row or shape.length
        return self.run.micro_batches(shape.rows, shape.length, shape.supervised, micro_steps)

    def _timed(self, passes: Sequence[Interval], micro_steps: int, tokens: int) -> StepTime | None:
        if self.clock is None:
            return None
        return self.clock.step(passes, self.run.updates, micro_steps, tokens * micro_steps)

    @property
    def overhead(self) -> Overhead:
        """What lies outside tensors on the device."""
        return OVERHEADS[self.device]


def _cost(plan: MemoryPlan) -> float:
    """What plans of one micro-batch are compared by: time, or work where the card is not known."""
    return plan.work if plan.time is None else plan.time.total_s

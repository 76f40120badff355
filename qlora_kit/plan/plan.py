"""What a run will take: its own loading and its own step, on fake tensors, before a byte is read.

    planner = Planner(BaseConfig("llama-7b"), LoRAConfig(), TrainingConfig())
    plan = planner.plan(BatchShape(rows=1, length=1024, supervised=1024))

There is no formula beside the code that trains: `plan/fake_model.py` loads the model and
`plan/fake_run.py` steps it, with the run's own code on fake tensors, while a counter adds up what
is allocated. Only what lies outside tensors is a table (`device/found.py`). `auto` takes the
levels of recompute from `plan/levels.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.config_only import open_shape
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.device.found import OVERHEADS, Overhead, find_device
from qlora_kit.device.target import has_own_memory
from qlora_kit.memory.counter import COMPONENTS, HOST, Interval, Sizes, most_of_each
from qlora_kit.plan.fake_model import IDLE, FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.levels import Chosen, choose_levels, recomputed_share
from qlora_kit.plan.step_time import Clock, StepTime

HELD = ("weights_quantized", "weights_other", "adapters", "optimizer", "paged")
"""Those that are there before a step and after it."""


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch of a run: `rows` of `length` tokens, `supervised` of each trained on.

    `packed` rows hold several shorter ones, isolated from each other, the longest of which has
    `longest_row` tokens; as many as a pack where that is not known.
    """

    rows: int
    length: int
    supervised: int
    packed: bool = False
    longest_row: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on its device, and where in it they are reached.

    `bytes` has the most of each component over a step (names of run.json's `memory`), `at_peak`
    what is there at the peak: their sum, `paged` left out, is `peak_bytes`, which includes
    `overhead`. `phases` has the peak of tensors in load, inject, forward, backward and step.
    `levels` are those of the decoder layers, `recomputed` the share of a forward pass's work that
    backward does again. A run fits where `margin_bytes` stay free beside its peak. The micro-batch
    that is planned has `tokens` tokens, padding included. `optim` names the optimizer; `why_optim`
    says why that one, where `auto` left more than one to choose from. `time` is estimated for a
    known card. `placement` is what lies on the host or is done in pieces.
    """

    bytes: Sizes
    peak_bytes: int
    peak_phase: str
    peak_module: str
    at_peak: Sizes
    phases: Sizes
    host_peak_bytes: int
    device: str
    levels: tuple[str, ...]
    recomputed: float
    budget_bytes: int | None = None
    margin_bytes: int = 0
    tokens: int = 0
    optim: str = ""
    why_optim: str = ""
    time: StepTime | None = None
    placement: Placement = ON_DEVICE

    @property
    def missing_bytes(self) -> int:
        """What the peak and the margin are above the budget; 0 where they fit, or there is none."""
        if self.budget_bytes is None:
            return 0
        return max(0, self.peak_bytes + self.margin_bytes - self.budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether peak and margin are within the budget; true where there is none."""
        return not self.missing_bytes

    @property
    def place(self) -> str:
        """Where the peak is, in words."""
        return f"{self.peak_phase}, {self.peak_module}" if self.peak_module else self.peak_phase

    @property
    def recompute(self) -> str:
        """The levels in words: `full`, or `12 full, 4 selective, 16 none`."""
        counts = {level: self.levels.count(level) for level in dict.fromkeys(self.levels)}
        if len(counts) == 1:
            return self.levels[0]
        return ", ".join(f"{count} {level}" for level, count in counts.items())

    @property
    def optimizer(self) -> str:
        """The optimizer in words, with the reason where there is one."""
        return f"{self.optim} ({self.why_optim})" if self.why_optim else self.optim

    @property
    def planned(self) -> Sizes:
        """The `planned` part of run.json's `memory`."""
        return {**self.bytes, "peak": self.peak_bytes}

    def as_json(self) -> dict[str, Any]:
        """What `qlora-kit plan --json` prints of it."""
        result: dict[str, Any] = {
            "bytes": dict(self.bytes),
            "peak_bytes": self.peak_bytes,
            "peak": {"phase": self.peak_phase, "module": self.peak_module},
            "at_peak": dict(self.at_peak),
            "phases": dict(self.phases),
            "host_peak_bytes": self.host_peak_bytes,
            "budget_bytes": self.budget_bytes,
            "margin_bytes": self.margin_bytes,
            "fits": self.fits,
            "device": self.device,
            "gradient_checkpointing": self.recompute,
            "levels": list(self.levels),
            "recomputed": self.recomputed,
            "optim": self.optim,
            "why_optim": self.why_optim,
            "placement": asdict(self.placement),
        }
        if self.time is not None:
            result["time"] = self.time.as_json()
        return result


class Planner:
    """Plans of one base, its adapters and its optimizer, for any micro-batch and any levels.

    Of a base that a run has `opened` no file is opened again. With a `clock` plans say the time of
    a step, and `auto` goes by it.

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
    ) -> None:
        target = torch.device(device) if device else find_device(base.device)
        self.device, self.clock, self.training = target.type, clock, training
        self.placements = training.placements_on(has_own_memory(target))
        # An adapter to go on with has rank and targets of its own, which `lora` has taken over.
        fresh = replace(lora, adapter=None, adapter_fingerprint=None, allow_other_base=False)
        self._made: dict[Any, MemoryPlan] = {}
        self._traced: dict[Any, dict[tuple[str, ...], Chosen]] = {}
        given = (opened.embedding_rows, opened.files) if opened else (None, None)
        shape = open_shape(base, target, *given)
        self.notes = shape.notes if shape.warning is None else (*shape.notes, shape.warning)
        self.model = shape.model
        self.left, self.in_16_bits = shape.left, shape.in_16_bits
        capability = clock.capability if clock else None

        def run_with(placement: Placement) -> FakeRun:
            # Each fills a model of its own: where tensors lie is decided when they are loaded.
            opened = shape if placement == self.placements[0] else open_shape(base, target, *given)
            return FakeRun(FakeModel(opened, fresh, training, target, capability, placement))

        self._run_with, self._runs = run_with, dict[Placement, FakeRun]()
        self.run = self._take(self.placements[0])
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
        `placement` are the first of `optims` and `placements` with which the plan fits, or the
        last of them.
        """
        level = level or self.training.gradient_checkpointing
        micro_steps = micro_steps or self.training.gradient_accumulation_steps
        asked = shape, level, budget_bytes, micro_steps
        optims = self.optims if optim is None else (optim,)
        placements = self.placements if placement is None else (placement,)
        for where, name in itertools.product(placements, optims):
            key = where, name, *asked
            if key not in self._made:
                self.run = self._take(where)
                self.run.take_optimizer(name)
                plan = self._plan(*asked)
                why = self._why(name, plan)
                self._made[key] = replace(plan, optim=name, why_optim=why, placement=where)
            if self._made[key].fits:
                break
        return self._made[key]

    def _take(self, placement: Placement) -> FakeRun:
        """The fake run whose tensors lie where this says; made when it is first asked for."""
        if placement not in self._runs:
            self._runs[placement] = self._run_with(placement)
        return self._runs[placement]

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
        batches = self._batches(shape, micro_steps)
        if level == "auto":
            budget = None if budget_bytes is None else self.overhead.room(budget_bytes)
            known = self._traced.setdefault((id(self.run), self.run.optim, shape, micro_steps), {})
            chosen = choose_levels(self.run, batches, budget, self.clock, known)
        else:
            levels = (level,) * len(self.run.layers)
            chosen = Chosen(levels, tuple(self.run.passes(batches, levels)))
        tokens = batches[-1]["input_ids"].numel()
        time = self._timed(chosen.intervals, micro_steps, tokens)
        return replace(self._plan_of(chosen, shape, budget_bytes), tokens=tokens, time=time)

    def time(self, shape: BatchShape, levels: Sequence[str], micro_steps: int) -> StepTime | None:
        """What a step of such micro-batches takes with given levels, where there is a clock."""
        batches = self._batches(shape, micro_steps)
        passes = self.run.passes(batches, levels)
        return self._timed(passes, micro_steps, batches[-1]["input_ids"].numel())

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

    def _plan_of(self, chosen: Chosen, shape: BatchShape, budget_bytes: int | None) -> MemoryPlan:
        run = self.run
        updates = run.updates_after(chosen.intervals[-1].end)
        everything = (*run.loading, *chosen.intervals, *updates)
        highest = max(everything, key=lambda interval: interval.peak)
        overhead = self.overhead.fixed
        at_peak = {k: n for k, n in highest.at_peak.items() if n and k not in (HOST, IDLE)}
        # What is held is what the passes find; the optimizer's step has more for a moment.
        sizes = most_of_each(chosen.intervals) | {
            name: size for name, size in chosen.intervals[0].start.items() if name in HELD
        }
        bytes_ = {name: sizes.get(name, 0) for name in COMPONENTS}
        bytes_["weights"] = bytes_["weights_quantized"] + bytes_["weights_other"]
        phases: Sizes = {}
        for interval in everything:
            phases[interval.phase] = max(phases.get(interval.phase, 0), interval.peak)
        on_host = self.device != "cpu"
        return MemoryPlan(
            bytes=bytes_,
            peak_bytes=highest.peak + overhead,
            peak_phase=highest.phase,
            peak_module=highest.module,
            at_peak={**at_peak, "overhead": overhead} if overhead else at_peak,
            phases=phases,
            host_peak_bytes=most_of_each(run.loading).get(HOST, 0) if on_host else phases["load"],
            device=self.device,
            levels=chosen.levels,
            recomputed=recomputed_share(run, chosen.levels, shape.length),
            budget_bytes=budget_bytes,
            margin_bytes=self.overhead.margin(highest.peak),
        )

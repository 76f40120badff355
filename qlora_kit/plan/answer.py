"""What `plan` answers: the plan of a run, what would make it fit, and a table of other shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.lora.targets import auto_note
from qlora_kit.options.parsed import Parsed
from qlora_kit.plan.asked_device import asked_budget, asked_clock, asked_device
from qlora_kit.plan.micro_batch import fastest_rows
from qlora_kit.plan.plan import BatchShape, MemoryPlan, Planner
from qlora_kit.plan.quantization_error import (
    QuantizationErrors,
    check_errors,
    quantization_errors,
)
from qlora_kit.plan.suggest import Options, Suggestion, suggest

ROWS, LONGEST, PARTS = (1, 2, 4, 8), 4096, (8, 4, 2, 1)
"""Of the table that `--grid` makes: its lengths are parts of the longest, or of the context."""

NO_BF16 = (
    "{} has no units for bf16 and is far slower in it than is estimated here: fp16, which --dtype "
    "auto takes there, is what it multiplies"
)


@dataclass(frozen=True)
class Cell:
    """The plan of one batch size and length of the table."""

    batch_size: int
    max_length: int
    plan: MemoryPlan

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        time = self.plan.time
        return {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "peak_bytes": self.plan.peak_bytes,
            "gradient_checkpointing": self.plan.recompute,
            "fits": self.plan.fits,
        } | ({} if time is None else {"tokens_per_s": time.tokens_per_s})


@dataclass(frozen=True)
class Answer:
    """The plan of the options, and what was asked beside it; `overhead` says who measured it.

    `notes` are those on the base, `left` says what of it stays in 16 bits, `in_16_bits` in numbers.
    `errors` is what quantizing does to its linears. `hours` are those of a run, an estimate, where
    the card and the steps are known.
    """

    options: Options
    overhead: str
    plan: MemoryPlan
    suggestions: Sequence[Suggestion]
    grid: Sequence[Cell] | None
    notes: Sequence[str] = ()
    errors: QuantizationErrors | None = None
    left: str | None = None
    in_16_bits: Mapping[str, float] | None = None
    hours: float | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        result = self.plan.as_json()
        result["batch_size"] = self.options.training.rows
        result["suggestions"] = [
            {"change": one.change, "peak_bytes": one.plan.peak_bytes} for one in self.suggestions
        ]
        if self.grid is not None:
            result["grid"] = [cell.as_json() for cell in self.grid]
        if self.hours is not None:
            result["hours"] = self.hours
        if self.in_16_bits is not None:
            result["in_16_bits"] = dict(self.in_16_bits)
        if self.notes:
            result["notes"] = list(self.notes)
        if self.errors is not None:
            result["quantization_error"] = self.errors.as_json()
        return result


def answer(parsed: Parsed) -> Answer:
    """Plan what the options ask for. Errors: `ConfigError`, and those of a `config.json`."""
    asked, base, lora = parsed[PlanConfig], parsed[BaseConfig], parsed[LoRAConfig]
    training, device = parsed[TrainingConfig], asked_device(base, asked)
    clock = asked_clock(device, asked)
    if clock is not None and not clock.card.has_bf16 and base.dtype == "auto":
        base = replace(base, dtype="fp16")
    if asked.quantization_error:
        check_errors(base)
    planner = Planner(base, lora, training, device, clock=clock)
    # Both groups have the option, and the first one of them is given it.
    data = replace(parsed[DataConfig], max_length=asked.max_length)
    length = data.length_in(planner.run.context)
    budget = asked_budget(device, training, asked)
    training = _in_micro_batches(planner, training, length, asked.packing, budget)
    options = Options(base, lora, training, length, asked.packing)
    steps = training.gradient_accumulation_steps
    plan = planner.plan(options.largest, budget_bytes=budget, micro_steps=steps)
    suggestions = [] if plan.fits or budget is None else suggest(options, planner, device, budget)
    grid = _grid(planner, options, budget) if asked.grid else None
    errors = quantization_errors(base) if asked.quantization_error else None
    overhead = planner.overhead.source
    notes, left, in_16_bits = planner.notes, planner.left, planner.in_16_bits
    if lora.target_modules == "auto" and (auto := auto_note(planner.model)):
        notes = (*notes, auto)
    if clock is not None and not clock.card.has_bf16 and base.dtype == "bf16":
        notes = (*notes, NO_BF16.format(clock.card.name))
    hours = _hours(plan, training, asked)
    return Answer(
        options, overhead, plan, suggestions, grid, notes, errors, left, in_16_bits, hours
    )


def _in_micro_batches(
    planner: Planner, training: TrainingConfig, length: int, packing: bool, budget: int | None
) -> TrainingConfig:
    """The same steps with the rows of a micro-batch, where they are left to the plan."""
    if training.batch_size is not None or planner.clock is None:
        return training.in_micro_batches_of(training.rows)

    def plan_of(rows: int) -> MemoryPlan:
        shape, steps = BatchShape(rows, length, length, packing), training.step_rows // rows
        return planner.plan(shape, budget_bytes=budget, micro_steps=steps)

    def seconds_of(rows: int, plan: MemoryPlan) -> float:
        assert plan.time is not None
        return plan.time.total_s

    return training.in_micro_batches_of(fastest_rows(training.step_rows, plan_of, seconds_of))


def _hours(plan: MemoryPlan, training: TrainingConfig, asked: PlanConfig) -> float | None:
    """Of a run's steps: as many as are asked for, or as the data set gives."""
    if plan.time is None:
        return None
    epochs, seconds = training.num_train_epochs, None
    if training.max_steps is not None:
        seconds = training.max_steps * plan.time.total_s
    elif asked.rows is not None:
        seconds = epochs * asked.rows / training.step_rows * plan.time.total_s
    elif asked.tokens is not None:
        seconds = epochs * asked.tokens / plan.time.tokens_per_s
    return None if seconds is None else seconds / 3600


def _grid(planner: Planner, options: Options, budget: int | None) -> list[Cell]:
    """The plans of batches and lengths, up to the model's context."""
    cells, longest = [], min(LONGEST, planner.run.context)
    for length in (longest // part for part in PARTS):
        for rows in ROWS:
            shape = BatchShape(rows, length, length, options.packing)
            cells.append(Cell(rows, length, planner.plan(shape, budget_bytes=budget)))
    return cells

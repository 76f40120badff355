"""What `plan` answers: the plan of a run, what would make it fit, and a table of other shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import available_bytes, find_device
from qlora_kit.lora.targets import auto_note
from qlora_kit.options.checks import size_bytes
from qlora_kit.options.parsed import Parsed
from qlora_kit.plan.plan import BatchShape, MemoryPlan, Planner
from qlora_kit.plan.quantization_error import (
    QuantizationErrors,
    check_errors,
    quantization_errors,
)
from qlora_kit.plan.suggest import Options, Suggestion, suggest

ROWS, LONGEST, PARTS = (1, 2, 4, 8), 4096, (8, 4, 2, 1)
"""Of the table that `--grid` makes: its lengths are parts of the longest, or of the context."""


@dataclass(frozen=True)
class Cell:
    """The plan of one batch size and length of the table."""

    batch_size: int
    max_length: int
    plan: MemoryPlan


@dataclass(frozen=True)
class Answer:
    """The plan of the options, and what was asked beside it; `overhead` says who measured it.

    `notes` are those on the base, `left` says what of it stays in 16 bits, `in_16_bits` in numbers.
    `errors` is what quantizing does to its linears.
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

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        result = self.plan.as_json()
        result["suggestions"] = [
            {"change": one.change, "peak_bytes": one.plan.peak_bytes} for one in self.suggestions
        ]
        if self.grid is not None:
            result["grid"] = [
                {
                    "batch_size": cell.batch_size,
                    "max_length": cell.max_length,
                    "peak_bytes": cell.plan.peak_bytes,
                    "gradient_checkpointing": cell.plan.recompute,
                    "fits": cell.plan.fits,
                }
                for cell in self.grid
            ]
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
    training, device = parsed[TrainingConfig], _device(base, asked)
    if asked.quantization_error:
        check_errors(base)
    planner = Planner(base, lora, training, device, margin=True)
    # Both groups have the option, and the first one of them is given it.
    data = replace(parsed[DataConfig], max_length=asked.max_length)
    length = data.length_in(planner.run.context)
    options = Options(base, lora, training, length, asked.packing)
    budget = _budget(device, training, asked)
    plan = planner.plan(options.largest, budget_bytes=budget)
    suggestions = [] if plan.fits or budget is None else suggest(options, planner, device, budget)
    grid = _grid(planner, options, budget) if asked.grid else None
    errors = quantization_errors(base) if asked.quantization_error else None
    overhead = planner.overhead.source
    notes, left, in_16_bits = planner.notes, planner.left, planner.in_16_bits
    if lora.target_modules == "auto" and (auto := auto_note(planner.model)):
        notes = (*notes, auto)
    return Answer(options, overhead, plan, suggestions, grid, notes, errors, left, in_16_bits)


def _device(base: BaseConfig, asked: PlanConfig) -> str:
    """The kind of device that is planned for: a card's memory is that of a GPU."""
    if base.device != "auto":
        return base.device.partition(":")[0]
    return "cuda" if asked.device_memory is not None else find_device("auto").type


def _budget(device: str, training: TrainingConfig, asked: PlanConfig) -> int | None:
    """What the run may take: what is given, the smaller of both; else what this device has free."""
    given = [size_bytes(one) for one in (training.memory_budget, asked.device_memory) if one]
    if given:
        return min(given)
    here = device == "cpu" or torch.cuda.is_available()
    return available_bytes(torch.device(device)) if here else None


def _grid(planner: Planner, options: Options, budget: int | None) -> list[Cell]:
    """The plans of batches and lengths, up to the model's context."""
    cells, longest = [], min(LONGEST, planner.run.context)
    for length in (longest // part for part in PARTS):
        for rows in ROWS:
            shape = BatchShape(rows, length, length, options.packing)
            cells.append(Cell(rows, length, planner.plan(shape, budget_bytes=budget)))
    return cells

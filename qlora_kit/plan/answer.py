"""What `plan` answers: the plan of a run, what would make it fit, and tables of other shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.plan.grid import Cell
from qlora_kit.plan.longest import Longest
from qlora_kit.plan.memory_plan import MemoryPlan
from qlora_kit.plan.quantization_error import QuantizationErrors
from qlora_kit.plan.suggest import Options, Suggestion


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
    longest: Sequence[Longest] | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        result = self.plan.as_json()
        result["batch_size"] = self.options.training.rows
        result["suggestions"] = [
            {"change": one.change, "peak_bytes": one.plan.peak_bytes} for one in self.suggestions
        ]
        if self.grid is not None:
            result["grid"] = [cell.as_json() for cell in self.grid]
        if self.longest is not None:
            result["longest"] = [one.as_json() for one in self.longest]
        if self.hours is not None:
            result["hours"] = self.hours
        if self.in_16_bits is not None:
            result["in_16_bits"] = dict(self.in_16_bits)
        if self.notes:
            result["notes"] = list(self.notes)
        if self.errors is not None:
            result["quantization_error"] = self.errors.as_json()
        return result

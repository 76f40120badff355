"""The plans of several batch sizes and lengths, as a table has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.suggest import Options

ROWS, LONGEST, PARTS = (1, 2, 4, 8), 4096, (8, 4, 2, 1)
"""Of the table: its lengths are parts of the longest, or of the context."""


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


def grid_of(planner: Planner, options: Options, budget: int | None) -> list[Cell]:
    """The plans of batches and lengths, up to the model's context."""
    cells, longest = [], min(LONGEST, planner.run.context)
    for length in (longest // part for part in PARTS):
        for rows in ROWS:
            shape = BatchShape(rows, length, length, options.packing)
            cells.append(Cell(rows, length, planner.plan(shape, budget_bytes=budget)))
    return cells

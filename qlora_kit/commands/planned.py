"""The memory plan of a training run: of its largest batch, on its device, within what is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_kit.data.batch import lengths_of
from qlora_kit.errors import ConfigError
from qlora_kit.memory.measure import free_bytes
from qlora_kit.memory.overhead import OVERHEADS
from qlora_kit.memory.plan import MemoryPlan, Planner, Window

if TYPE_CHECKING:
    from qlora_kit.base.load import OpenBase
    from qlora_kit.config import RunConfig
    from qlora_kit.data.order import Packs
    from qlora_kit.data.tokens import Encoded


def planned_run(
    config: RunConfig,
    base: OpenBase,
    rows: Sequence[Encoded],
    packs: Packs | None,
    ranks: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """The plan of a run whose options are resolved; `ranks` are those of a loaded adapter.

    Errors: `ConfigError` for a `--memory_budget` that `auto` cannot keep.
    """
    training, lora = config.training, config.lora
    lengths = lengths_of(rows)
    if packs is None:
        count, longest = len(rows), int(lengths.max())
    else:
        count, longest = len(packs), max(int(lengths[packs[i]].sum()) for i in range(len(packs)))
    if ranks:
        lora = replace(lora, r=max(ranks.values()))
    # The files are the ones that were checked, wherever the name came from.
    where = replace(config.base, model=str(base.source.directory), revision=None)
    planner = Planner(where, lora, training, embedding_rows=base.embedding_rows)
    window = Window(min(training.batch_size, count), longest, longest, packs is not None)
    budget = training.budget_bytes
    plan = planner.plan(window, budget_bytes=budget or available_bytes(base.device))
    if budget is not None and not plan.fits and training.gradient_checkpointing == "auto":
        raise ConfigError(
            f"memory_budget {training.memory_budget} is below the {plan.peak_bytes} bytes that "
            f"the run takes with everything recomputed (peak in {plan.place})",
            "raise it, or lower --max_length, --batch_size or --bits; "
            "`qlora-kit plan` with the same options names what would fit",
        )
    return plan


def available_bytes(device: torch.device) -> int:
    """What a process may take of a device: what is free, and what it has taken already."""
    return free_bytes(device) + OVERHEADS[device.type].fixed

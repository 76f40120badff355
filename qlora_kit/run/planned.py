"""The memory plan of a training run: of its largest batch, on its device, within what is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.batch import lengths_of
from qlora_kit.data.largest import largest_batch, most_alone, most_supervised
from qlora_kit.device import OVERHEADS, free_bytes
from qlora_kit.errors import ConfigError
from qlora_kit.plan.plan import MemoryPlan, Planner, Window

if TYPE_CHECKING:
    from qlora_kit.base.load import OpenBase
    from qlora_kit.config.run import RunConfig
    from qlora_kit.data.order import Packs
    from qlora_kit.data.tokens import Encoded


def planned_run(
    config: RunConfig,
    base: OpenBase,
    rows: Sequence[Encoded],
    packs: Packs | None,
    num_steps: int,
    ranks: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """The plan of a run whose options are resolved; `ranks` are those of a loaded adapter.

    It is that of the largest micro-batch of its `num_steps` steps, every token trained on.

    Errors: `ConfigError` for a `--memory_budget` that `auto` cannot keep.
    """
    training, lora = config.training, config.lora
    if ranks:
        lora = replace(lora, r=max(ranks.values()))
    # The files are the ones that were checked, wherever the name came from.
    where = replace(config.base, model=str(base.source.directory), revision=None)
    planner = Planner(where, lora, training, embedding_rows=base.embedding_rows, margin=True)
    budget = training.budget_bytes
    plans = [
        planner.plan(window, budget_bytes=budget or available_bytes(base.device), micro_steps=steps)
        for window, steps in _windows(config, rows, packs, num_steps)
    ]
    plan = max(plans, key=lambda one: (one.recomputed, one.peak_bytes))
    plan = replace(plan, tokens=max(one.tokens for one in plans))
    if budget is not None and not plan.fits and training.gradient_checkpointing == "auto":
        raise ConfigError(
            f"memory_budget {training.memory_budget} is {plan.missing_bytes} bytes below what the "
            f"run takes with everything recomputed (peak of {plan.peak_bytes} in {plan.place})",
            "raise it by that, or lower --max_length, --batch_size or --bits; "
            "`qlora-kit plan` with the same options names what would fit",
        )
    return plan


def _windows(
    config: RunConfig, rows: Sequence[Encoded], packs: Packs | None, num_steps: int
) -> Iterator[tuple[Window, int]]:
    """The micro-batches that may take the most, with the number of them in a step.

    Among packs that is also the largest without any row beside another one: attention then takes
    all sequences at once.
    """
    training, lengths = config.training, lengths_of(rows)
    settings: dict[str, Any] = {
        "batch_size": training.batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "num_steps": num_steps,
        "seed": training.seed,
        "group_by_length": config.data.group_by_length,
    }
    count = len(rows) if packs is None else len(packs)
    steps = min(training.gradient_accumulation_steps, -(-count // training.batch_size))
    largest = largest_batch(rows, packs=packs, **settings)
    assert largest is not None  # a run has steps
    length = max(int(lengths[list(group)].sum()) for group in largest.rows)
    longest, trained = int(lengths.max()), most_supervised(rows, packs, length)
    yield Window(len(largest.rows), length, trained, packs is not None, longest), steps
    if packs is not None and (alone := most_alone(rows, packs, **settings)):
        yield Window(alone, length, trained), steps


def available_bytes(device: torch.device) -> int:
    """What a process may take of a device: what is free, and what it has taken already."""
    return free_bytes(device) + OVERHEADS[device.type].fixed

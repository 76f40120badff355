"""Plans of runs that are kept, so that runs of the same options are planned once.

A run of a tiny model takes as long for its plan as for all else, and tests run the same one again
and again: with faults, resumed, with other files. What a plan is, `tests/plan` shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.run import RunConfig
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.plan.memory_plan import MemoryPlan
from qlora_kit.run import planned, plans, prepare

AMPLE = 10
"""A plan that takes a tenth of the room at most is the same whatever the room."""


@contextlib.contextmanager
def kept_plans(folder: Path) -> Iterator[None]:
    """Inside, runs of this process and its forks keep their plans in a folder.

    Under all that a plan depends on: the options, the base's files, the adapters' rank and the
    largest micro-batches; where the plan itself chooses these, or has a budget, nothing is kept.
    """
    # As they are before a test counts calls of `os`, or replaces what a run calls.
    real, rename = prepare.planned_run, os.replace

    def planned_run(
        config: RunConfig, base: Base, schedule: StepSchedule, rank: int
    ) -> tuple[StepSchedule, MemoryPlan]:
        training = config.training
        if training.batch_size is None or training.memory_budget is not None:
            return real(config, base, schedule, rank)
        shapes = tuple(plans._largest_shapes(schedule))
        asked = (config.base, config.lora, training, base.files.fingerprint, shapes, rank)
        path = folder / hashlib.sha256(repr(asked).encode()).hexdigest()
        if path.exists():
            plan: MemoryPlan = pickle.loads(path.read_bytes())
            room = planned.available_bytes(base.device)
            if AMPLE * plan.peak_bytes <= room:
                return schedule, replace(plan, budget_bytes=room)
        schedule, plan = real(config, base, schedule, rank)
        # A run with a fault may have no room for it, or end here.
        with contextlib.suppress(OSError):
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_bytes(pickle.dumps(plan))
            rename(beside, path)
        return schedule, plan

    prepare.planned_run = planned_run
    try:
        yield
    finally:
        prepare.planned_run = real

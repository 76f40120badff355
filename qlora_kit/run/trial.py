"""Whether a run's largest batch is tried before its first step, and which one it is.

On CUDA it always is. On the CPU, where every tensor was counted by the plan, it is where the plan
comes near to the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_kit.training.guard import Guard
from qlora_kit.training.optimizer import make_paged_states
from qlora_kit.training.preference import objective_of
from qlora_kit.training.preflight import is_due, preflight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.run.prepare import PreparedRun


def try_largest(
    plan: PreparedRun,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    start_step: int,
) -> int:
    """Run the preflight of the steps after `start_step` where it is due; the largest batch's step.

    0 where there are no steps left. Paged states, which the preflight does not hold for a while,
    are made for good before it. Errors: `ResourceError` where not even one of its rows fits.
    """
    memory, schedule = plan.memory, plan.schedule
    guard.planned_bytes = memory.peak_bytes
    found = schedule.after(start_step).largest()
    if found is None:
        return 0
    make_paged_states(optimizer)
    if is_due(plan.base.device, memory.peak_bytes, memory.budget_bytes):
        batch, accumulates = schedule.collate(found.sequences), schedule.accumulation > 1
        preflight(
            model,
            optimizer,
            batch,
            guard,
            accumulates=accumulates,
            objective=objective_of(plan.config.training),
        )
    return found.step

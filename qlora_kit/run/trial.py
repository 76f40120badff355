"""Whether a run's largest batch is tried before its first step, and which one it is.

On CUDA it always is. On the CPU, where every tensor was counted by the plan, it is where the plan
comes near to the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.batch import padding_id
from qlora_kit.data.largest import largest_batch
from qlora_kit.training.guard import Guard
from qlora_kit.training.preflight import is_due, preflight

if TYPE_CHECKING:
    from qlora_kit.run.prepared import PreparedRun


def try_largest(
    plan: PreparedRun, model: Any, optimizer: torch.optim.Optimizer, guard: Guard, start_step: int
) -> int:
    """Run the preflight of the steps after `start_step` where it is due; the largest batch's step.

    0 where there are no steps left. Errors: `ResourceError` where not even one of its rows fits.
    """
    training, rows, memory = plan.config.training, plan.encoded.rows, plan.memory
    guard.planned_bytes = memory.peak_bytes
    found = largest_batch(
        rows,
        batch_size=training.batch_size,
        accumulation=training.gradient_accumulation_steps,
        num_steps=plan.total_steps,
        seed=training.seed,
        start_step=start_step,
        packs=plan.packs,
        group_by_length=plan.config.data.group_by_length,
    )
    if found is None:
        return 0
    if is_due(plan.base.device, memory.peak_bytes, memory.budget_bytes):
        batch = found.batch(rows, padding_id(plan.base.tokenizer))
        accumulates = training.gradient_accumulation_steps > 1
        preflight(model, optimizer, batch, guard, accumulates=accumulates)
    return found.step

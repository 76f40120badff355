"""Whether a run's largest batch is tried before its first step, and which one it is.

On CUDA it always is. On the CPU, where another process may take or give memory at any time, it is
where the plan comes near to what is free; a bound from the shapes of the linears spares runs that
are far from it the seconds of a plan.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.base.shape import open_shape
from qlora_kit.data.batch import padding_id
from qlora_kit.data.largest import largest_batch
from qlora_kit.memory.fake import FakeRun
from qlora_kit.memory.measure import adapter_bytes, weight_bytes
from qlora_kit.training.guard import Guard, free_bytes
from qlora_kit.training.preflight import is_due, preflight

if TYPE_CHECKING:
    from qlora_kit.commands.run import Plan
    from qlora_kit.data.batch import Batch

BOUND_BYTES = 8
"""For each token and each number that goes into or comes out of a linear: twice what fp32 keeps."""


def try_largest(
    plan: Plan, model: Any, optimizer: torch.optim.Optimizer, guard: Guard, start_step: int
) -> int:
    """Run the preflight of the steps after `start_step` where it is due; the largest batch's step.

    0 where there are no steps left. Errors: `ResourceError` where not even one of its rows fits.
    """
    training, rows = plan.config.training, plan.encoded.rows
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
    batch = found.batch(rows, padding_id(plan.base.tokenizer))
    accumulates = training.gradient_accumulation_steps > 1
    guard.planned_bytes = functools.cache(lambda: planned_bytes(plan, batch, accumulates))
    device = plan.base.device
    if device.type != "cuda":
        held = weight_bytes(model)["weights"] + adapter_bytes(model)["adapters"]
        available = held + free_bytes(model)
        near = is_due(device, held + _bound(model, batch), available)
        if not near or not is_due(device, guard.planned_bytes(), available):
            return found.step
    preflight(model, optimizer, batch, guard, accumulates=accumulates)
    return found.step


def planned_bytes(plan: Plan, batch: Batch, accumulates: bool) -> int:
    """The peak of a step with this batch by the memory plan, weights and states included."""
    config, device = plan.config, plan.base.device
    count, length = batch["input_ids"].shape
    directory = str(plan.base.source.directory)
    shape = dataclasses.replace(config.base, model=directory, revision=None)
    base = open_shape(shape, device)
    with torch.random.fork_rng([]):  # adapters are drawn
        run = FakeRun(base, config.lora, config.training, device, plan.packs is not None)
    supervised = min(length - 1, -(-batch["num_supervised"] // count))
    window = run.window(count, length, supervised, 1 + accumulates)
    levels = [config.training.gradient_checkpointing] * len(run.layers)
    stretches = run.passes(window, range(len(run.layers)), levels)
    return max(one.peak for one in (*stretches, *run.updates))


def _bound(model: Any, batch: Batch) -> int:
    """More than what a step with this batch takes beside the weights, without a plan."""
    linears = (one for one in model.modules() if isinstance(one, nn.Linear))
    numbers = sum(one.in_features + one.out_features for one in linears)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return int(BOUND_BYTES * (batch["input_ids"].numel() * numbers + 2 * trained))

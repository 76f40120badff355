"""A run on a device that is found to hold less than was planned.

Its largest batch is tried before its first step: on CUDA always, on the CPU, where every tensor was
counted by the plan, where the plan comes near to the budget.

A plan counts tensors. What a card holds besides is known to some share only, and another process
may take of it at any time. Where a step goes out of memory, the run is planned again within less
than the plan in force, and its layers are set to what that plan chose: the next mix of levels, down
to `full` in all of them, or tiles of MLPs and inputs of layers on the host, which a loaded model
can go on with. None of it changes a number of the run. So it goes on as one that was given that,
and rows are only halved, or the run refused, when nothing is left to recompute or to move.

Less is what the allocator says was missing, at least a share of the plan that doubles each time:
it names one allocation and does not know the later ones, and each time costs a plan and a step.

All that is for the passes of a step, which can be taken again. The optimizer's part cannot: it goes
from parameter to parameter, and where it fails nobody knows which of them it has changed. So its
states are made before the first step, where nothing is lost yet; after that it allocates next to
nothing. Where even that is not there the run ends, and what it has in memory is not saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_kit.device.target import has_own_memory
from qlora_kit.errors import ResourceError
from qlora_kit.plan.memory_plan import MemoryPlan
from qlora_kit.process.out_of_memory import is_out_of_memory
from qlora_kit.run.plans import RunPlans
from qlora_kit.training.guard import Guard
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.optimizer import make_states
from qlora_kit.training.preference import objective_of
from qlora_kit.training.preflight import is_due, preflight
from qlora_kit.training.prepare import prepare_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from qlora_kit.run.prepare import PreparedRun

STEP = 0.02
"""The least that a plan is lowered by at first, as a share of it."""
RELOADING = {"--offload_embedding", "--offload_base"}
"""What decides where weights are loaded to."""


def try_largest(
    plan: PreparedRun,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    start_step: int,
) -> int:
    """Run the preflight of the steps after `start_step` where it is due; the largest batch's step.

    0 where there are no steps left. The optimizer has all of its states before it. Errors:
    `ResourceError` where they do not fit, or not even one of the batch's rows.
    """
    memory, schedule = plan.memory, plan.schedule
    guard.planned_bytes = memory.peak_bytes
    found = schedule.after(start_step).largest()
    if found is None:
        return 0
    try:
        make_states(optimizer)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory as the states of the optimizer were made: {memory.peak_bytes} bytes "
            f"planned for the run ({error})",
            f"lower --memory_budget, or use {_smaller_states(plan)}",
        ) from error
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


def half_taken(
    plan: PreparedRun, step: int, error: Exception, checkpoint: Path | None
) -> ResourceError | None:
    """What is said where `error` ended the optimizer's part of a step; None if it is another one.

    `checkpoint` is the last one.
    """
    if not is_out_of_memory(error):
        return None
    kept = "there is no checkpoint yet" if checkpoint is None else f"{checkpoint} is whole"
    again = f"start again with {_smaller_states(plan)}"
    if checkpoint is not None:
        again = f"go on from it with --resume_from_checkpoint once more is free, or {again}"
    return ResourceError(
        f"step {step} is not saved, for the optimizer may have taken half of it: {kept}; "
        f"out of memory ({error or type(error).__name__})",
        again,
    )


def _smaller_states(plan: PreparedRun) -> str:
    """The options with which an optimizer has less on the device."""
    own_memory, optim = has_own_memory(plan.base.device), plan.config.training.optim
    smaller = "paged_adamw_8bit" if own_memory else "adamw_8bit"
    is_small = optim.startswith("paged") if own_memory else "8bit" in optim
    return "a smaller --lora_r" if is_small else f"--optim {smaller} or a smaller --lora_r"


class Replan:
    """The memory plan that a run goes by: `memory`, as prepared until its device was full."""

    def __init__(
        self, plan: PreparedRun, model: PreTrainedModel, note: Callable[[str], None]
    ) -> None:
        self.memory: MemoryPlan = plan.memory
        self._plan, self._model, self._note = plan, model, note
        self._plans: RunPlans | None = None
        self._share, self._said = STEP, False

    def __call__(self, missing_bytes: int | None) -> int | None:
        """Recompute or move more, for an allocation that fell short by so many bytes.

        The planned bytes with it; None where the level was given or nothing is left to change.
        """
        before, training = self.memory, self._plan.config.training
        if training.gradient_checkpointing != "auto":
            return None
        takes = before.peak_bytes + before.margin_bytes
        found = self._within(takes - max(missing_bytes or 0, int(self._share * takes)))
        self._share *= 2
        if found is None or (found.levels, found.placement) == (before.levels, before.placement):
            self._say_what_reloads()
            return None
        self.memory = replace(found, budget_bytes=before.budget_bytes)
        changes = [f"gradient checkpointing {found.recompute} instead of {before.recompute}"]
        if found.placement != before.placement:
            prepare_model(self._model, training, found.levels, placement=found.placement)
            changes.append(found.in_effect.words)
        set_recompute(self._model, found.levels)
        short = "" if missing_bytes is None else f" ({missing_bytes} bytes were missing)"
        self._note(
            f"out of memory with {before.peak_bytes} bytes planned{short}: going on with "
            f"{found.peak_bytes}, {', '.join(changes)}, which is the same step"
        )
        return found.peak_bytes

    def _say_what_reloads(self) -> None:
        """Name the options that would hold less, but decide where weights are loaded to."""
        training, where = self._plan.config.training, self.memory.placement
        flags = training.flags_from(where, has_own_memory(self._plan.base.device))
        loading = [flag for flag in flags.split() if flag in RELOADING]
        if loading and not self._said:
            self._said = True
            self._note(
                f"started again with {' '.join(loading)}, and --resume_from_checkpoint auto where "
                "there is a checkpoint, the run would hold less on its device"
            )

    def _within(self, budget_bytes: int) -> MemoryPlan | None:
        """The plan within a budget; None where not even for planning there is memory."""
        plan = self._plan
        try:
            # What a plan draws is no part of the run.
            with torch.random.fork_rng([]):
                if self._plans is None:
                    rank = max(plan.ranks.values())
                    held = self.memory.host["step"]
                    self._plans = RunPlans(
                        plan.config, plan.base, plan.schedule, rank, held_bytes=held
                    )
                own_memory = has_own_memory(plan.base.device)
                places = plan.config.training.placements_from(self.memory.placement, own_memory)
                return self._plans.within(budget_bytes, self.memory.optim, places)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

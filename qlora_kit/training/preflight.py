"""Tries the largest batch of a run before its first step, so that what cannot fit fails at once.

A data set may hide its one long row at its end, hours away. `preflight` sends the largest
micro-batch through forward and backward by the training loop's own step, which then takes no
optimizer step, beside as much memory as the run will hold at that place: gradients where a step has
several micro-batches, and the optimizer's states, which are there already (`make_states`). Where
the device is full, the guard does what it does in a step: has more recomputed, halves, or refuses.

Everything that a step depends on is as before: no parameter, gradient, optimizer state or random
state changes, the places of dropout are those of a run that has not begun, and the order of rows
is never touched. Only what was found to be needed is kept: levels of recompute, which change no
number, and `max_rows` of the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kit.base.decoder import in_mode
from qlora_kit.device.target import has_own_memory
from qlora_kit.training.guard import Guard
from qlora_kit.training.host_gradients import waiting_of
from qlora_kit.training.loop import Backward, train_step
from qlora_kit.training.loss import SUPERVISED_TOKENS, Objective
from qlora_kit.training.optimizer import gradient_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.batch import Batch

TIGHT = 0.9
"""On the CPU a plan of less than this share of its budget needs no trial."""


def is_due(device: torch.device, planned_bytes: int, budget_bytes: int | None) -> bool:
    """Whether a run of this plan should be tried first; without a budget, on CUDA only."""
    near = budget_bytes is not None and planned_bytes > TIGHT * budget_bytes
    return has_own_memory(device) or near


def preflight(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    guard: Guard,
    *,
    accumulates: bool,
    objective: Objective = SUPERVISED_TOKENS,
) -> None:
    """Run the passes of `batch` before the first step of this process; nothing else changes.

    `accumulates` says that other micro-batches come before it in its step. Errors:
    `ResourceError` where one row does not fit, `Stopped`.
    """
    device = model.device
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def as_in_a_run(backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
        if accumulates:
            for parameter in trained:
                if waiting_of(parameter) is None:
                    parameter.grad = gradient_like(parameter).zero_()
        return backward(micro_batches)

    def run_backward(backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
        return guard.run_backward(lambda parts: as_in_a_run(backward, parts), micro_batches)

    # A base with dropout of its own draws from torch's generators.
    devices = [device] if has_own_memory(device) else []
    try:
        with in_mode(model.modules(), training=True), torch.random.fork_rng(devices):
            train_step(
                model,
                [batch],
                optimizer,
                step=0,
                max_grad_norm=1.0,
                run_backward=run_backward,
                before_step=lambda step, loss, norm: False,
                objective=objective,
            )
    finally:
        guard.drop_gradients()
        for module in model.modules():
            if hasattr(module, "seek"):
                module.seek(0, 0)

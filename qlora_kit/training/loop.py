"""The training loop: accumulate, clip, step, report; nothing else.

It gets a model, the micro-batches of each step, an optimizer, and callables that are called around
a step. It knows neither adapters nor quantization nor memory. The gradient of a step is that of the
mean of an objective over all that its micro-batches have: their supervised tokens, or their pairs
of rows, however they are spread over them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kit.training.gradients import clipped, total_norm
from qlora_kit.training.host_gradients import come_back
from qlora_kit.training.loss import SUPERVISED_TOKENS, Objective, to_device
from qlora_kit.training.loss_scale import LossScale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.batch import Batch

MicroBatches = Sequence["Batch"]
Backward = Callable[[MicroBatches], Tensor]
"""Runs forward and backward of micro-batches; returns the means of their objective in fp32."""
RunBackward = Callable[[Backward, Sequence["Batch"]], Tensor]
"""Calls a `Backward` with micro-batches of the same rows, again where that can help, or raises."""
BeforeStep = Callable[[int, float, float], bool]
"""Is called with step, loss and gradient norm before the optimizer; False skips the step."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step was: the mean of its objective, and of what that `measures`.

    `loss_scale` is the factor that it was taken with in fp16.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    loss_scale: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


def train(
    model: PreTrainedModel,
    steps: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: Callable[[int], float] | None = None,
    max_grad_norm: float = 1.0,
    run_backward: RunBackward | None = None,
    before_step: BeforeStep | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    loss_scale: LossScale | None = None,
    start_step: int = 0,
    objective: Objective = SUPERVISED_TOKENS,
) -> list[StepReport]:
    """Train `model`, one optimizer step for the micro-batches of each of `steps`; their reports.

    `learning_rate` gives the rate of a step (counted from 1); without it the optimizer's own is
    kept. `run_backward` wraps the passes of a step, `before_step` is called before its optimizer
    step and `on_step` after it. A step whose fp16 gradients overflow is taken again with a smaller
    `loss_scale`. The model is left in the mode it had.
    """
    was_training, scale = model.training, loss_scale or LossScale.of(model)
    model.train()
    history = []
    try:
        for step, micro_batches in enumerate(steps, start=start_step + 1):
            began = time.perf_counter()
            if learning_rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
            read = _Read(before_step, scale)
            while read.again:
                train_step(
                    model,
                    micro_batches,
                    optimizer,
                    step=step,
                    max_grad_norm=max_grad_norm,
                    loss_scale=scale.value,
                    run_backward=run_backward,
                    before_step=read,
                    objective=objective,
                )
            report = StepReport(
                step=step,
                loss=read.loss,
                learning_rate=optimizer.param_groups[0]["lr"],
                grad_norm=read.grad_norm,
                tokens=sum(sum(batch["lengths"]) for batch in micro_batches),
                supervised_tokens=sum(batch["num_supervised"] for batch in micro_batches),
                seconds=time.perf_counter() - began,
                loss_scale=read.loss_scale,
                measures=dict(zip(objective.measures, read.measured, strict=True)),
            )
            history.append(report)
            if on_step is not None:
                on_step(report)
    finally:
        model.train(was_training)
    return history


class _Read:
    """Reads means and the gradient norm of a step; a `BeforeStep` gets loss and norm.

    In one transfer, before the optimizer is given its work: the only place of a step that waits for
    the device. What the optimizer does then overlaps with the beginning of the next step. `again`
    says that the step is to be taken, at first and where its gradients were too large for fp16.
    """

    def __init__(self, before_step: BeforeStep | None, scale: LossScale) -> None:
        self._before_step, self._scale = before_step, scale
        self.loss = self.grad_norm = float("nan")
        self.measured: list[float] = []
        self.loss_scale: float | None = None
        self.again = True

    def __call__(self, step: int, means: Tensor, grad_norm: Tensor) -> bool:
        self.loss_scale = self._scale.value if self._scale.is_dynamic else None
        read = torch.cat((means.reshape(-1), grad_norm.reshape(1))).tolist()
        self.loss, *self.measured, self.grad_norm = read
        is_good = math.isfinite(self.grad_norm)
        self.again = (
            not is_good and math.isfinite(self.loss) and self._scale.overflowed(step, self.loss)
        )
        if self.again:
            return False
        if is_good and math.isfinite(self.loss):
            self._scale.took_step()
        return self._before_step is None or self._before_step(step, self.loss, self.grad_norm)


def train_step(
    model: PreTrainedModel,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    max_grad_norm: float,
    loss_scale: float | None = None,
    run_backward: RunBackward | None = None,
    before_step: Callable[[int, Tensor, Tensor], bool] | None = None,
    objective: Objective = SUPERVISED_TOKENS,
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the means of its objective and its gradient norm, on the device.

    The loss is multiplied by `loss_scale` (without one by what a run of the model's dtype begins
    with), and the gradients divided by it. Reads nothing back to Python, so that it also runs on
    fake tensors.
    """
    scale = LossScale.of(model).value if loss_scale is None else loss_scale

    def backward(micro_batches: Sequence[Batch]) -> Tensor:
        return _accumulate(model, micro_batches, step, scale, objective)

    if run_backward is None:
        means = backward(micro_batches)
    else:
        means = run_backward(backward, micro_batches)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    come_back(trained)
    grads = [p.grad for p in trained if p.grad is not None]
    if grads and scale != 1.0:
        torch._foreach_mul_(grads, 1 / scale)
    # Not clip_grad_norm_: a norm that is not finite would spread over gradients that are. Of no
    # gradients torch's is on the host.
    grad_norm = total_norm(grads).to(means.device)
    if before_step is None or before_step(step, means, grad_norm):
        for _ in clipped(trained, max_grad_norm, grad_norm):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, grad_norm


def _accumulate(
    model: PreTrainedModel,
    micro_batches: Sequence[Batch],
    step: int,
    scale: float,
    objective: Objective,
) -> Tensor:
    """Add the gradient of the micro-batches' mean loss to the parameters; returns the means.

    They are the loss, a scalar, or with what the objective measures (1 + M,). The gradients come
    out `scale` times too large.
    """
    # Divide by the step's supervised tokens, not by its micro-batches: they differ in length, and
    # the mean of means is not the mean.
    count = sum(objective.count(batch) for batch in micro_batches)
    placed = [module for module in model.modules() if hasattr(module, "seek")]
    shape = (1 + len(objective.measures),) if objective.measures else ()
    total = torch.zeros(shape, dtype=torch.float32, device=model.device)
    for micro_step, batch in enumerate(micro_batches):
        for module in placed:
            module.seek(step, micro_step)
        sums = objective.sums(model, to_device(batch, model.device)) / count
        loss = sums[0] if objective.measures else sums
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += sums.detach()
        del loss, sums  # nothing of a micro-batch is there when the next one begins
    return total

"""The training loop: accumulate, clip, step, report; nothing else.

It gets a model, windows of micro-batches, an optimizer, and callables that hear of each step. It
knows neither adapters nor quantization nor memory. A window is one optimizer step: its gradient is
that of the mean loss over all supervised tokens of the window, however they are spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_kit.training.loss import supervised_loss, to_device

if TYPE_CHECKING:
    from qlora_kit.data.batch import Batch

Gradients = Callable[[Sequence["Batch"]], Tensor]
"""Runs forward and backward of a window; returns its mean loss."""
Attempt = Callable[[Gradients, Sequence["Batch"]], Tensor]
"""Calls a `Gradients` with a window of the same rows, again where that can help, or raises."""
Check = Callable[[int, Tensor, Tensor], bool]
"""Hears step, loss and gradient norm before the optimizer does; False leaves the step out."""

FP16_LOSS_SCALE = 1024.0
"""fp16 gradients below 6e-8 would be zeros; the factor is taken out again before clipping."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step was: a mean loss over `supervised_tokens`, in nats."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


def train(
    model: Any,
    windows: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: Callable[[int], float] | None = None,
    max_grad_norm: float = 1.0,
    attempt: Attempt | None = None,
    check: Check | None = None,
    listen: Callable[[StepReport], None] | None = None,
    start_step: int = 0,
) -> list[StepReport]:
    """Train `model` with one optimizer step for each window; returns the steps' reports.

    `learning_rate` gives the rate of a step (counted from 1); without it the optimizer's own is
    kept. `attempt` stands around the passes of a step, `check` is asked before its optimizer step
    and `listen` hears of it afterwards. The model is left in the mode it had.
    """
    was_training = model.training
    model.train()
    history = []
    try:
        for step, window in enumerate(windows, start=start_step + 1):
            began = time.perf_counter()
            if learning_rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
            loss, grad_norm = train_step(
                model,
                window,
                optimizer,
                step=step,
                max_grad_norm=max_grad_norm,
                attempt=attempt,
                check=check,
            )
            report = StepReport(
                step=step,
                loss=float(loss),
                learning_rate=optimizer.param_groups[0]["lr"],
                grad_norm=float(grad_norm),
                tokens=sum(sum(batch["lengths"]) for batch in window),
                supervised_tokens=sum(batch["num_supervised"] for batch in window),
                seconds=time.perf_counter() - began,
            )
            history.append(report)
            if listen is not None:
                listen(report)
    finally:
        model.train(was_training)
    return history


def train_step(
    model: Any,
    window: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    max_grad_norm: float,
    attempt: Attempt | None = None,
    check: Check | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over a window; returns its mean loss and its gradient norm, as tensors.

    Reads nothing back to Python, so that it also runs on fake tensors.
    """

    def gradients(window: Sequence[Batch]) -> Tensor:
        return _accumulate(model, window, step)

    loss = gradients(window) if attempt is None else attempt(gradients, window)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in trained if p.grad is not None]
    if model.get_input_embeddings().weight.dtype is torch.float16:
        torch._foreach_mul_(grads, 1 / FP16_LOSS_SCALE)
    # Not clip_grad_norm_: a norm that is not finite would spread over gradients that are.
    grad_norm = nn.utils.get_total_norm(grads)
    if check is None or check(step, loss, grad_norm):
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, grad_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def _accumulate(model: Any, window: Sequence[Batch], step: int) -> Tensor:
    """Add the gradient of a window's mean loss to the parameters; returns that loss.

    fp16 gradients come out `FP16_LOSS_SCALE` times too large.
    """
    weight = model.get_input_embeddings().weight
    scale = FP16_LOSS_SCALE if weight.dtype is torch.float16 else 1.0
    # Divide by the window's supervised tokens, not by its micro-batches: they differ in length,
    # and the mean of means is not the mean.
    tokens = sum(batch["num_supervised"] for batch in window)
    placed = [module for module in model.modules() if hasattr(module, "seek")]
    total = torch.zeros((), dtype=torch.float32, device=weight.device)
    for micro_step, batch in enumerate(window):
        for module in placed:
            module.seek(step, micro_step)
        loss = supervised_loss(model, to_device(batch, weight.device)) / tokens
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        del loss  # nothing of a micro-batch is there when the next one begins
    return total

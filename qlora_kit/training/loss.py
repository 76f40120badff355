"""Cross-entropy over the supervised tokens, in chunks, with a frozen output head.

The logits of all tokens are never held: only supervised positions reach the head, a few hundred
rows at a time, and each chunk's gradient by the hidden states is made while its logits are there.
What is kept for backward has the size of the supervised hidden states. Evaluation uses the same
code without the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.device import representative
from qlora_kit.kernels.matmul import grad_input, matmul_dtype, weight_parts

if TYPE_CHECKING:
    from qlora_kit.data.batch import Batch

CHUNK_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over `tokens` supervised tokens."""

    loss: float
    tokens: int


def supervised_loss(model: Any, batch: Batch) -> Tensor:
    """The sum (not the mean) over a batch's supervised tokens of -log p, a scalar in fp32."""
    hidden = model.base_model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch["supervised"])
    # `supervised` points at the position that predicts; its target is the next token of the row.
    targets = batch["labels"].reshape(-1).index_select(0, batch["supervised"] + 1)
    scale, softcap = logit_scale_and_softcap(model.config)
    return cross_entropy_sum(rows, model.get_output_embeddings(), targets, softcap, scale)


def logit_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """The factor on a head's logits, and their soft cap, where the family's own forward has them.

    In the config.json of another family the same keys mean nothing.
    """
    scale = 1 / config.logits_scaling if config.model_type == "granite" else 1.0
    return scale, config.final_logit_softcapping if config.model_type == "gemma2" else None


def evaluate(model: Any, batches: Iterable[Batch]) -> Evaluation:
    """Minus the log-probability of all supervised tokens divided by their number.

    Runs in evaluation mode and restores the mode that was set; draws no random number.
    """
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            for batch in batches:
                # Sums of many batches in double: a mean of batch means would weigh them wrong.
                total += float(supervised_loss(model, to_device(batch, device)))
                tokens += batch["num_supervised"]
    finally:
        model.train(training)
    return Evaluation(total / tokens if tokens else float("nan"), tokens)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    return moved  # type: ignore[return-value]


def cross_entropy_sum(
    rows: Tensor,
    head: nn.Linear,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of -log softmax(scale * head(rows))[targets]; `rows` (N, h), `targets` (N,).

    The `head` is frozen: backward reaches `rows` only. With `softcap` c the scaled logits are
    c * tanh(logits / c).
    """
    return _CrossEntropySum.apply(rows, head.weight, head.bias, targets, softcap, scale)  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropySum(torch.autograd.Function):
    """The chunked loss; its gradient by the rows is made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # One buffer for all chunks: on the CPU fresh memory of this size costs a chunk's time.
        space = rows.new_empty(min(CHUNK_ROWS, rows.shape[0]), weight.shape[0], dtype=torch.float32)
        dtype = matmul_dtype(rows)
        product = space if dtype is torch.float32 else torch.empty_like(space, dtype=dtype)
        for start in representative(range(0, rows.shape[0], CHUNK_ROWS), rows):
            part = rows[start : start + CHUNK_ROWS]
            count = part.shape[0]
            raw, logits = product[:count], space[:count]
            values = part.to(dtype)
            for place, some in weight_parts(weight, dtype):
                if bias is None:
                    torch.mm(values, some.t(), out=raw[:, place])
                else:
                    torch.addmm(bias[place].to(dtype), values, some.t(), out=raw[:, place])
            logits.copy_(raw)
            if scale != 1.0:
                logits.mul_(scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            index = targets[start : start + count].unsqueeze(1)
            # d/dlogits of the sum is softmax - one_hot, through the soft cap where there is one.
            slope = None
            if softcap is not None and grad_rows is not None:
                slope = (logits / softcap).square_().neg_().add_(1)
            torch.log_softmax(logits, 1, out=logits)
            total -= logits.gather(1, index).sum()
            if grad_rows is None:
                continue
            logits.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=logits.dtype))
            if slope is not None:
                logits.mul_(slope)
            if scale != 1.0:
                logits.mul_(scale)
            into = grad_rows[start : start + count]
            if dtype is rows.dtype:
                torch.mm(raw.copy_(logits), weight, out=into)
            else:
                into.copy_(grad_input(logits, weight))
        ctx.save_for_backward(grad_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_rows,) = ctx.saved_tensors
        return grad_rows * grads[0].to(grad_rows.dtype), None, None, None, None, None

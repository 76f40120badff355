"""Cross-entropy through a frozen output head, in chunks of tokens, so that logits are few.

The logits of all tokens are never held: a few hundred tokens at a time reach the head, and each
chunk's gradient by the hidden states is made while its logits are there. What is kept for backward
has the size of the hidden states. Without a gradient, as in evaluation, nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.device.target import representative
from qlora_kit.kernels.matmul import grad_input, matmul_dtype, weight_parts

CHUNK_TOKENS = 256


def cross_entropy_sum(
    tokens: Tensor,
    head: nn.Linear,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of -log softmax(scale * head(tokens))[targets], a scalar in fp32.

    `tokens` (N, h), the weight of `head` (V, h), `targets` (N,). The head is frozen: backward
    reaches `tokens` only. With `softcap` c the scaled logits are c * tanh(logits / c).
    """
    return _CrossEntropySum.apply(tokens, head.weight, head.bias, targets, softcap, scale)  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropySum(torch.autograd.Function):
    """The chunked loss; its gradient by the tokens is made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=tokens.device)
        grad_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        # One buffer (chunk, V) for all chunks: on the CPU fresh memory of this size costs a
        # chunk's time.
        chunk = min(CHUNK_TOKENS, tokens.shape[0])
        space = tokens.new_empty(chunk, weight.shape[0], dtype=torch.float32)
        dtype = matmul_dtype(tokens)
        multiplied = space if dtype is torch.float32 else torch.empty_like(space, dtype=dtype)
        for start in representative(range(0, tokens.shape[0], CHUNK_TOKENS), tokens):
            part = tokens[start : start + CHUNK_TOKENS]
            count = part.shape[0]  # the last chunk is short
            raw, logits = multiplied[:count], space[:count]
            values = part.to(dtype)
            for columns, some in weight_parts(weight, dtype):
                if bias is None:
                    torch.mm(values, some.t(), out=raw[:, columns])
                else:
                    torch.addmm(bias[columns].to(dtype), values, some.t(), out=raw[:, columns])
            logits.copy_(raw)
            if scale != 1.0:
                logits.mul_(scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            index = targets[start : start + count].unsqueeze(1)  # (count, 1)
            # d/dlogits of the sum is softmax - one_hot, through the soft cap where there is one.
            slope = None
            if softcap is not None and grad_tokens is not None:
                slope = (logits / softcap).square_().neg_().add_(1)
            torch.log_softmax(logits, 1, out=logits)
            total -= logits.gather(1, index).sum()
            if grad_tokens is None:
                continue
            logits.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=logits.dtype))
            if slope is not None:
                logits.mul_(slope)
            if scale != 1.0:
                logits.mul_(scale)
            into = grad_tokens[start : start + count]
            if dtype is tokens.dtype:
                torch.mm(raw.copy_(logits), weight, out=into)
            else:
                into.copy_(grad_input(logits, weight))
        ctx.save_for_backward(grad_tokens)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_tokens,) = ctx.saved_tensors
        return grad_tokens * grads[0].to(grad_tokens.dtype), None, None, None, None, None

"""RMSNorm with a frozen weight: forward as the model's own, backward from its input alone.

Three styles exist. Llama's rounds x / rms to the dtype of x and then multiplies by the weight;
OLMo 2's multiplies by the weight in fp32 and rounds once, and so does Gemma's by 1 + weight. For
backward the input and one fp32 number a token are kept; the normalized tokens are recomputed where
they are needed.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class FrozenNorm:
    """RMSNorm over the last dimension, n; `weight` is (n,) or none, `from_zero` means 1 + weight.

    `rounds_once` says that the weight is applied in fp32, as it is where it counts from zero.
    Besides its input the scale of every token is kept for backward (`keeps`).
    """

    weight: Tensor | None
    eps: float
    from_zero: bool
    rounds_once: bool = False
    keeps: ClassVar[bool] = True

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (..., n) normalized, in its dtype, and the fp32 (..., 1) it was multiplied by."""
        tokens = x.float()
        scale = tokens.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return self._weighted(tokens * scale, x.dtype), scale

    def recompute(self, x: Tensor, *, kept: Tensor) -> Tensor:
        """The normalized tokens (..., n) once more, from the scale (..., 1) that `apply` gave."""
        # bf16 tokens times their fp32 scale are fp32.
        return self._weighted(x * kept, x.dtype)

    def backward(self, grad: Tensor, x: Tensor, *, kept: Tensor) -> tuple[Tensor]:
        """The gradient by `x` (..., n), from that by the normalized tokens (..., n)."""
        grad = grad.float()
        if self.weight is not None:
            grad = grad * (self.weight.float() + 1 if self.from_zero else self.weight.float())
        tokens = x * kept
        along = (grad * tokens).mean(-1, keepdim=True)
        # Not in place where no weight made a tensor of ours.
        subtracted = torch.Tensor.addcmul if self.weight is None else torch.Tensor.addcmul_
        return (subtracted(grad, tokens, along, value=-1).mul_(kept).to(x.dtype),)

    def _weighted(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if self.weight is None:
            return tokens.to(dtype)
        if self.from_zero:
            return tokens.mul_(1.0 + self.weight.float()).to(dtype)
        if self.rounds_once:
            return tokens.mul_(self.weight.float()).to(dtype)
        return tokens.to(dtype).mul_(self.weight)


def normalize(norm: FrozenNorm, x: Tensor) -> Tensor:
    """The normalized `x` (..., n) alone, as a node of the graph."""
    return _Normalize.apply(x, norm)  # type: ignore[no-any-return, no-untyped-call]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: FrozenNorm) -> Tensor:
        y, scale = norm.apply(x)
        ctx.norm = norm
        ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        return *ctx.norm.backward(grads[0], x, kept=scale), None

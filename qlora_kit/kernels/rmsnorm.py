"""RMSNorm with a frozen weight: forward as the model's own, backward from its input alone.

Three styles exist. Llama's rounds x / rms to the dtype of x and then multiplies by the weight;
OLMo 2's multiplies by the weight in fp32 and rounds once, and so does Gemma's by 1 + weight. For
backward the input and one fp32 number a token are kept; the normalized tokens are recomputed where
they are needed. On CUDA each of these is one Triton kernel (`triton_rmsnorm.py`), and so is the sum
of a residual that is normalized at once.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.kernels.triton_ops import WIDEST_ROW, uses_triton


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
        if self._in_triton(x):
            return self._launched(x, None)[1:]
        return self.by_torch(x)

    def by_torch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`apply` in torch's operations, whose numbers are a model's own to the last bit."""
        tokens = x.float()
        scale = tokens.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return self._weighted(tokens * scale, x.dtype), scale

    def apply_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x + y`, both (..., n), and what `apply` gives for it."""
        if self._in_triton(x) and x.dtype is y.dtype and x.shape == y.shape:
            return self._launched(x, y)
        summed = x + y
        return summed, *self.apply(summed)

    def recompute(self, x: Tensor, *, kept: Tensor) -> Tensor:
        """The normalized tokens (..., n) once more, from the scale (..., 1) that `apply` gave."""
        if self._in_triton(x):
            x = x.contiguous()
            y = torch.empty_like(x)
            torch.ops.qlora_kit.triton_normalize_again.out(x, kept, self.weight, self._style, y=y)
            return y
        # bf16 tokens times their fp32 scale are fp32.
        return self._weighted(x * kept, x.dtype)

    def backward(
        self, grad: Tensor, x: Tensor, *, kept: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor]:
        """The gradient by `x` (..., n), from that by the normalized tokens (..., n).

        `residual` (..., n), that by another use of `x`, is added to it.
        """
        if self._in_triton(x) and grad.dtype is x.dtype:
            grad, x = grad.contiguous(), x.contiguous()
            residual = None if residual is None else residual.contiguous()
            out = torch.empty_like(x)
            torch.ops.qlora_kit.triton_normalize_backward.out(
                grad, x, kept, self.weight, self._style, residual, out=out
            )
            return (out,)
        grad = grad.float()
        if self.weight is not None:
            grad = grad * (self.weight.float() + 1 if self.from_zero else self.weight.float())
        tokens = x * kept
        along = (grad * tokens).mean(-1, keepdim=True)
        # Not in place where no weight made a tensor of ours.
        subtracted = torch.Tensor.addcmul if self.weight is None else torch.Tensor.addcmul_
        result = subtracted(grad, tokens, along, value=-1).mul_(kept).to(x.dtype)
        return (result if residual is None else result.add_(residual),)

    def _in_triton(self, x: Tensor) -> bool:
        return uses_triton(x) and 0 < x.shape[-1] <= WIDEST_ROW and x.numel() > 0

    @property
    def _style(self) -> int:
        """What the kernels call it."""
        if self.weight is None:
            return 0
        return 3 if self.from_zero else 2 if self.rounds_once else 1

    def _launched(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, or `x` itself, the normalized tokens and their scales."""
        x, added = x.contiguous(), None if added is None else added.contiguous()
        summed = None if added is None else torch.empty_like(x)
        y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        torch.ops.qlora_kit.triton_normalize.out(
            x, added, self.weight, self.eps, self._style, summed=summed, y=y, scale=scale
        )
        return x if summed is None else summed, y, scale

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


def add_and_normalize(norm: FrozenNorm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x + y` (..., n), a node of the graph, and what `norm` makes of it, in no graph."""
    return _Add.apply(x, y, norm)  # type: ignore[no-any-return, no-untyped-call]


class _Add(torch.autograd.Function):
    """A sum; whoever goes on with the normalized tokens knows their gradient (`lora/layer.py`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, norm: FrozenNorm) -> tuple[Tensor, Tensor, Tensor]:
        summed, tokens, scale = norm.apply_sum(x, y)
        ctx.mark_non_differentiable(tokens, scale)
        ctx.set_materialize_grads(False)
        return summed, tokens, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return grads[0], grads[0], None


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

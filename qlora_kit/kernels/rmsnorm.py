"""RMSNorm with a frozen weight: forward as the model's own, backward from its input alone.

Two styles exist. Llama's rounds x / rms to the dtype of x and then multiplies by the weight;
Gemma's multiplies by 1 + weight in fp32 and rounds once. Which one a module follows is found by
comparing outputs, not by its class. For backward the input and one fp32 number a row are kept; the
normalized rows are made again where they are needed.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from qlora_kit.device import has_values


@dataclass(frozen=True)
class FrozenNorm:
    """RMSNorm over the last dimension; `module` holds the weight, `from_zero` means 1 + weight.

    Besides its input the scale of every row is kept for backward (`keeps`).
    """

    module: nn.Module
    eps: float
    from_zero: bool
    keeps: ClassVar[bool] = True

    @classmethod
    def of(cls, module: nn.Module) -> FrozenNorm | None:
        """The norm that gives the numbers of `module`, or None where neither style does."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        if not has_values(weight):
            # A plan has no numbers; which style it is depends on the code alone.
            with unset_fake_temporarily():
                like = copy.copy(module)
                like._parameters = {"weight": nn.Parameter(torch.ones(weight.shape) + 0.5)}
                like.to(weight.dtype)
                found = cls.of(like)
            return None if found is None else cls(module, found.eps, found.from_zero)
        drawn = torch.Generator().manual_seed(0)
        x = torch.randn(4, weight.numel(), generator=drawn).to(weight.device, weight.dtype)
        with torch.no_grad():
            expected = module(x)
            for from_zero in (False, True):
                norm = cls(module, eps, from_zero)
                if torch.equal(norm.apply(x)[0], expected):
                    return norm
        return None

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (..., n) normalized, in its dtype, and the fp32 (..., 1) it was multiplied by."""
        rows = x.float()
        scale = rows.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return self._weighed(rows * scale, x.dtype), scale

    def again(self, x: Tensor, *, kept: Tensor) -> Tensor:
        """The normalized rows a second time, from what `apply` gave besides."""
        # The product of bf16 rows and their fp32 scale is fp32.
        return self._weighed(x * kept, x.dtype)

    def backward(self, grad: Tensor, x: Tensor, *, kept: Tensor) -> tuple[Tensor]:
        """The gradient by `x`, from that by the normalized rows."""
        weight = self._weight()
        grad = grad.float() * (weight.float() + 1 if self.from_zero else weight.float())
        rows = x * kept
        along = (grad * rows).mean(-1, keepdim=True)
        return (grad.addcmul_(rows, along, value=-1).mul_(kept).to(x.dtype),)

    def _weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    def _weighed(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self.from_zero:
            return rows.mul_(1.0 + self._weight().float()).to(dtype)
        return rows.to(dtype).mul_(self._weight())


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

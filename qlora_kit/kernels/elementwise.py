"""What a block does between its products, as nodes of the graph that keep the least.

Rotary positions keep cos and sin, which all layers share. The gated activation is what the MLP's
last linear reads: gate and up are kept, and their product is made again. Forward does the
operations of transformers in their order, so that the numbers are the same.
Sources: Su et al., RoFormer (arXiv 2104.09864); Shazeer, GLU Variants (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, T, heads, d) with its first (B, T, width) values turned by their positions."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        width = cos.shape[-1]
        half = width // 2
        y = _scaled(x, cos)
        y[..., :half].sub_(x[..., half:width] * sin[..., :half])
        y[..., half:width].add_(x[..., :half] * sin[..., half:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (one.unsqueeze(2) for one in ctx.saved_tensors)
        (grad,) = grads
        width = cos.shape[-1]
        half = width // 2
        result = _scaled(grad, cos)
        result[..., :half].add_(grad[..., half:width] * sin[..., half:])
        result[..., half:width].sub_(grad[..., :half] * sin[..., :half])
        return result, None, None


def _scaled(x: Tensor, cos: Tensor) -> Tensor:
    """`x * cos`; values beyond the width of `cos` as they are."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos
    return torch.cat((x[..., :width] * cos, x[..., width:]), dim=-1)


@dataclass(frozen=True)
class Gate:
    """`act(gate) * up`, (..., f); without `up`, `gate` (..., 2f) holds both, one behind the other.

    `activation` is one of `ACTIVATIONS`. Nothing besides its inputs is kept for backward (`keeps`).
    """

    activation: str
    keeps: ClassVar[bool] = False

    def apply(self, gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, None]:
        """The product; nothing besides."""
        return self.again(gate, up), None

    def again(self, gate: Tensor, up: Tensor | None = None, *, kept: None = None) -> Tensor:
        """The product, a second time as the first."""
        gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
        return ACTIVATIONS[self.activation][0](gate).mul_(up)

    def backward(
        self, grad: Tensor, gate: Tensor, up: Tensor | None = None, *, kept: None = None
    ) -> tuple[Tensor, ...]:
        """The gradients by the inputs, from that by the product, which is overwritten."""
        forward, backward = ACTIVATIONS[self.activation]
        values, factors = gate.chunk(2, dim=-1) if up is None else (gate, up)
        grad_up = forward(values).mul_(grad)
        grad_gate = backward(grad.mul_(factors), values)
        return (torch.cat((grad_gate, grad_up), dim=-1),) if up is None else (grad_gate, grad_up)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (_gelu_tanh, _gelu_tanh_backward),
}
"""Activations by transformers' names, each with its gradient."""

"""The gated activation of an MLP, which is recomputed from its inputs.

It is what the MLP's last linear reads: gate and up are kept for backward, and their combination is
not. Forward does the operations of transformers in their order, so that the numbers are the same.
Source: Shazeer, GLU Variants (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """`act(gate) * up`, all (..., f); without `up`, `gate` (..., 2f) holds both side by side.

    `activation` is one of `ACTIVATIONS`. Nothing besides its inputs is kept for backward (`keeps`).
    """

    activation: str
    keeps: ClassVar[bool] = False

    def apply(self, gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, None]:
        """The gated activation (..., f); nothing besides is kept."""
        return self.recompute(gate, up), None

    def recompute(self, gate: Tensor, up: Tensor | None = None, *, kept: None = None) -> Tensor:
        """The gated activation (..., f), bit for bit as the first time."""
        gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
        return ACTIVATIONS[self.activation][0](gate).mul_(up)

    def backward(
        self, grad: Tensor, gate: Tensor, up: Tensor | None = None, *, kept: None = None
    ) -> tuple[Tensor, ...]:
        """The gradients by the inputs, shaped like them; `grad` (..., f) is overwritten."""
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

"""The gated activation of an MLP, which is recomputed from its inputs.

It is what the MLP's last linear reads: gate and up are kept for backward, and their combination is
not. Forward does the operations of transformers in their order, so that the numbers are the same.
On CUDA forward and backward are one Triton kernel each (`triton_swiglu.py`).
Source: Shazeer, GLU Variants (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.triton_ops import uses_triton

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
        if uses_triton(gate) and gate.numel() and gate.dtype is up.dtype:
            out = gate.new_empty(gate.shape)
            launch = torch.ops.qlora_kit.triton_gate.out
            launch(_rows(gate), _rows(up), self.activation, out=_rows(out))
            return out
        return ACTIVATIONS[self.activation][0](gate).mul_(up)

    def backward(
        self, grad: Tensor, gate: Tensor, up: Tensor | None = None, *, kept: None = None
    ) -> tuple[Tensor, ...]:
        """The gradients by the inputs, shaped like them; `grad` (..., f) is overwritten."""
        if uses_triton(gate) and gate.numel() and grad.is_contiguous() and grad.dtype is gate.dtype:
            return self._launched(grad, gate, up)
        forward, backward = ACTIVATIONS[self.activation]
        values, factors = gate.chunk(2, dim=-1) if up is None else (gate, up)
        grad_up = forward(values).mul_(grad)
        grad_gate = backward(grad.mul_(factors), values)
        return (torch.cat((grad_gate, grad_up), dim=-1),) if up is None else (grad_gate, grad_up)

    def _launched(self, grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
        """`backward` by one kernel: the gradient by a `gate` of its own is in `grad`."""
        launch = torch.ops.qlora_kit.triton_gate_backward.out
        grad_rows = _rows(grad)
        if up is not None:
            by_up = torch.empty_like(grad)
            written = {"grad_gate": grad_rows, "grad_up": _rows(by_up)}
            launch(grad_rows, _rows(gate), _rows(up), self.activation, **written)
            return grad, by_up
        both = gate.new_empty(gate.shape)
        by_gate, by_up = map(_rows, both.chunk(2, dim=-1))
        written = {"grad_gate": by_gate, "grad_up": by_up}
        launch(grad_rows, *map(_rows, gate.chunk(2, dim=-1)), self.activation, **written)
        return (both,)


def _rows(x: Tensor) -> Tensor:
    """`x` (..., f) as rows (N, f), a view where all rows are equally far apart."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Activations by transformers' names, each with its gradient."""

"""Triton: the gated activation of an MLP, and both its gradients, in one pass each.

Both activations are `x * sigmoid(u)`: SiLU with u = x, the tanh form of GELU with
u = 2 sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh z) / 2 = sigmoid(2 z).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a row that one program gates."""
WARPS = 4


@triton.jit
def inner(x, GELU: tl.constexpr):
    """The argument u of the sigmoid, and its slope by x."""
    if GELU:
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        u, slope = x, 1.0
    return u, slope


@triton.jit
def gate_rows(
    gate,
    up,
    out,
    f,
    gate_row,
    up_row,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`act(gate) * up` of rows of `f` numbers, `gate_row` and `up_row` apart, into `out`."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < f
    x = tl.load(gate + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    u, _ = inner(x, GELU)
    value = (x * tl.sigmoid(u)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * f + cols, (value * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    f,
    gate_row,
    up_row,
    out_row,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients by gate and up from `grad` (rows, f), which `grad_gate` may be."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < f
    g = tl.load(grad + row * f + cols, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    u, slope = inner(x, GELU)
    s = tl.sigmoid(u)
    kind: tl.constexpr = grad.dtype.element_ty
    by_up = (x * s).to(kind).to(tl.float32) * g
    by_gate = (g * factor).to(kind).to(tl.float32) * (s + x * slope * s * (1.0 - s))
    tl.store(grad_up + row * out_row + cols, by_up.to(kind), mask=inside)
    tl.store(grad_gate + row * out_row + cols, by_gate.to(kind), mask=inside)


def launch_gate(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """`gate` and `up` (rows, f), rows any distance apart, into `out` (rows, f)."""
    rows, f = gate.shape
    gate_rows[(rows, triton.cdiv(f, BLOCK))](
        *(gate, up, out, f, gate.stride(0), up.stride(0)),
        GELU=activation != "silu",
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def launch_gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> None:
    """The gradients (rows, f), both with rows equally far apart; `grad_gate` may be `grad`."""
    rows, f = gate.shape
    gate_backward[(rows, triton.cdiv(f, BLOCK))](
        *(grad, gate, up, grad_gate, grad_up, f),
        *(gate.stride(0), up.stride(0), grad_gate.stride(0)),
        GELU=activation != "silu",
        BLOCK=BLOCK,
        num_warps=WARPS,
    )

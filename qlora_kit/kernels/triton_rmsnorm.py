"""Triton: RMSNorm forward, once more and backward, and a sum that is normalized at once.

A program has some whole rows in registers: each is read once and written once. The styles are those
of `rmsnorm.py`, rounded where they round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Numbers that a program has at least: so many narrow rows."""
A_WARP = 512
"""Numbers for each warp: 16 a thread."""


@triton.jit
def weighted(tokens, weight, cols, inside, STYLE: tl.constexpr, like):
    """Normalized fp32 tokens times the weight, in the dtype of the pointer `like`.

    The style: 0 has no weight, 1 rounds first, 2 multiplies in fp32, 3 so by 1 + weight.
    """
    if STYLE == 1:
        tokens = tokens.to(like.dtype.element_ty).to(tl.float32)
    if STYLE != 0:
        w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
        if STYLE == 3:
            w = w + 1.0
        tokens = tokens * w[None, :]
    return tokens.to(like.dtype.element_ty)


@triton.jit
def normalize_rows(
    x,
    added,
    weight,
    summed,
    y,
    scales,
    rows,
    n,
    eps,
    STYLE: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows (rows, n) of x, or of x + added, which goes to `summed`, normalized into `y`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (cols < n)[None, :]
    place = row[:, None] * n + cols[None, :]
    tokens = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        tokens = tokens + tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        rounded = tokens.to(summed.dtype.element_ty)
        tl.store(summed + place, rounded, mask=inside)
        tokens = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tokens * tokens, axis=1) / n + eps)
    tl.store(scales + row, scale, mask=row < rows)
    result = weighted(tokens * scale[:, None], weight, cols, cols < n, STYLE, y)
    tl.store(y + place, result, mask=inside)


@triton.jit
def normalize_again(
    x,
    weight,
    scales,
    y,
    rows,
    n,
    STYLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows (rows, n) of x normalized into `y` by the scales of the first time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (cols < n)[None, :]
    place = row[:, None] * n + cols[None, :]
    tokens = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    result = weighted(tokens * scale[:, None], weight, cols, cols < n, STYLE, y)
    tl.store(y + place, result, mask=inside)


@triton.jit
def normalize_backward(
    grad,
    x,
    weight,
    scales,
    residual,
    out,
    rows,
    n,
    STYLE: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient by x (rows, n), and `residual` added to it, rounded once into `out`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (cols < n)[None, :]
    place = row[:, None] * n + cols[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if STYLE != 0:
        w = tl.load(weight + cols, mask=cols < n, other=0.0).to(tl.float32)
        if STYLE == 3:
            w = w + 1.0
        g = g * w[None, :]
    scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    tokens = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    along = tl.sum(g * tokens, axis=1) / n
    result = (g - tokens * along[:, None]) * scale
    if ADDS:
        result = result + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def tile(n: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps, for rows of `n` numbers."""
    block = triton.next_power_of_2(n)
    rows = max(1, TILE // block)
    warps = min(16, max(1, rows * block // A_WARP))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def launch_normalize(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor | None,
    eps: float,
    style: int,
    summed: Tensor | None,
    y: Tensor,
    scale: Tensor,
) -> None:
    """`x` (..., n), or the sum that goes to `summed`, into `y`, and its scales (..., 1)."""
    n, rows = x.shape[-1], x.numel() // x.shape[-1]
    sizes = tile(n)
    normalize_rows[(triton.cdiv(rows, sizes["ROWS"]),)](
        *(x, added, weight, summed, y, scale, rows, n, eps),
        STYLE=style,
        ADDS=added is not None,
        **sizes,
    )


def launch_again(x: Tensor, scale: Tensor, weight: Tensor | None, style: int, y: Tensor) -> None:
    """`x` (..., n) by its scales (..., 1) into `y`."""
    n, rows = x.shape[-1], x.numel() // x.shape[-1]
    sizes = tile(n)
    normalize_again[(triton.cdiv(rows, sizes["ROWS"]),)](
        *(x, weight, scale, y, rows, n), STYLE=style, **sizes
    )


def launch_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    style: int,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """The gradient by `x` (..., n) and what comes from beside the norm, into `out`."""
    n, rows = x.shape[-1], x.numel() // x.shape[-1]
    sizes = tile(n)
    normalize_backward[(triton.cdiv(rows, sizes["ROWS"]),)](
        *(grad, x, weight, scale, residual, out, rows, n),
        STYLE=style,
        ADDS=residual is not None,
        **sizes,
    )

"""Rotary position embeddings as one node of the graph, which keeps cos and sin alone.

All layers share them. Forward does the operations of transformers in their order, so that the
numbers are the same; where cos and sin are fp32 beside 16-bit heads, so is the rotation, and its
result is rounded once. Most families turn a value with the one half a width further on, some (GLM,
Ernie, Helium) with its neighbour.
Source: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`x` (B, T, heads, d) with its first `width` values of d rotated by their positions.

    `cos` and `sin` are (B, T, width): the embeddings of the positions, both halves alike. Value i
    turns with value i + width / 2; `interleaved`, values 2i and 2i + 1 turn with each other.
    """
    return _Rotate.apply(x, cos, sin, interleaved)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    """(x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin); backward is the rotation by minus the angle.

    x1 and x2 are the pairs' first and second values, (B, T, heads, width / 2) each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, ctx.interleaved, back=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """`x` (B, T, heads, d) rotated, or rotated `back`, in its own dtype."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (B, T, 1, width): the same for all heads
    width = cos.shape[-1]
    half = width // 2
    first, second = slice(0, half), slice(half, width)
    sines = sin[..., :half], sin[..., half:]
    if interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
        cos, sines = cos[..., :half].repeat_interleave(2, dim=-1), (sines[0], sines[0])
    y = _scaled(x, cos)
    # Backward: a gradient by x1 is g1 cos + g2 sin, one by x2 is g2 cos - g1 sin.
    if back:
        y[..., first].add_(x[..., second] * sines[1])
        y[..., second].sub_(x[..., first] * sines[0])
    else:
        y[..., first].sub_(x[..., second] * sines[0])
        y[..., second].add_(x[..., first] * sines[1])
    return y.to(x.dtype)


def _scaled(x: Tensor, cos: Tensor) -> Tensor:
    """`x` (B, T, heads, d) times `cos` (B, T, 1, width); values beyond `width` as they are."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos
    return torch.cat((x[..., :width] * cos, x[..., width:]), dim=-1)

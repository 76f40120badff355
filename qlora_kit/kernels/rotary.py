"""Rotary position embeddings as one node of the graph, which keeps cos and sin alone.

All layers share them. Forward does the operations of transformers in their order, so that the
numbers are the same.
Source: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, T, heads, d) with its first `width` values of d rotated by their positions.

    `cos` and `sin` are (B, T, width): the embeddings of the positions, both halves alike.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    """(x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin); backward is the rotation by minus the angle.

    x1 and x2 are the halves of the first `width` values, (B, T, heads, width / 2) each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (B, T, 1, width): the same for all heads
        width = cos.shape[-1]
        half = width // 2
        y = _scaled(x, cos)
        y[..., :half].sub_(x[..., half:width] * sin[..., :half])
        y[..., half:width].add_(x[..., :half] * sin[..., half:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (x.unsqueeze(2) for x in ctx.saved_tensors)
        (grad,) = grads
        width = cos.shape[-1]
        half = width // 2
        result = _scaled(grad, cos)
        result[..., :half].add_(grad[..., half:width] * sin[..., half:])
        result[..., half:width].sub_(grad[..., :half] * sin[..., :half])
        return result, None, None


def _scaled(x: Tensor, cos: Tensor) -> Tensor:
    """`x` (B, T, heads, d) times `cos` (B, T, 1, width); values beyond `width` as they are."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos
    return torch.cat((x[..., :width] * cos, x[..., width:]), dim=-1)

"""Rotary position embeddings as one node of the graph, which keeps cos and sin alone.

All layers share them. Forward does the operations of transformers in their order, so that the
numbers are the same; where cos and sin are fp32 beside 16-bit heads, so is the rotation, and its
result is rounded once. Most families turn a value with the one half a width further on, some (GLM,
Ernie, Helium) with its neighbour.
On CUDA queries and keys are turned by one Triton kernel (`triton_rotary.py`).
Source: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.kernels.triton_ops import uses_triton


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`x` (B, T, heads, d) with its first `width` values of d rotated by their positions.

    `cos` and `sin` are (B, T, width): the embeddings of the positions, both halves alike. Value i
    turns with value i + width / 2; `interleaved`, values 2i and 2i + 1 turn with each other.
    """
    return _Rotate.apply(cos, sin, interleaved, x)[0]  # type: ignore[no-any-return, no-untyped-call]


def rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rotate` of queries (B, T, heads, d) and of keys (B, T, kv heads, d)."""
    if _in_triton(q, cos) and q.dtype is k.dtype and q.shape[-1] == k.shape[-1]:
        return _Rotate.apply(cos, sin, interleaved, q, k)  # type: ignore[no-any-return, no-untyped-call]
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


class _Rotate(torch.autograd.Function):
    """(x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin); backward is the rotation by minus the angle.

    x1 and x2 are the pairs' first and second values, (B, T, heads, width / 2) each. Queries and
    keys together are one launch forward and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, interleaved: bool, *heads: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(heads, cos, sin, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, None, None, *_rotated(grads, cos, sin, ctx.interleaved, back=True)


def _in_triton(x: Tensor, cos: Tensor) -> bool:
    return uses_triton(x) and cos.dtype in (x.dtype, torch.float32) and x.numel() > 0


def _launched(
    heads: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> tuple[Tensor, ...]:
    """Queries, and keys where they are given, (B, T, heads, d), rotated by one kernel."""
    # Of rows and tokens and heads any stride; one number lies beside the next.
    heads = [x if x.stride(-1) == 1 else x.contiguous() for x in heads]
    made = [x.new_empty(x.shape) for x in heads]
    k, k_out = (heads[1], made[1]) if len(heads) > 1 else (None, None)
    cos, sin = cos.contiguous(), sin.contiguous()
    torch.ops.qlora_kit.triton_rotate.out(
        heads[0], k, cos, sin, interleaved, back, q_out=made[0], k_out=k_out
    )
    return tuple(made)


def _rotated(
    heads: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> tuple[Tensor, ...]:
    """Some (B, T, heads, d) rotated, or rotated `back`, in their own dtype."""
    if _in_triton(heads[0], cos):
        return _launched(heads, cos, sin, interleaved, back)
    return tuple(_turned(x, cos, sin, interleaved, back) for x in heads)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
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

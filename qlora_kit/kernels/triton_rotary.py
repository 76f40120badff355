"""Triton: rotary position embeddings of queries and keys in one launch, and back.

A program turns some heads of one token, those of the queries or those of the keys. Products and
sums are rounded where torch's operations in `rotary.py` round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024
"""Pairs of values that a program turns at most."""
WARPS = 4


@triton.jit
def turned(x1, x2, c1, c2, s1, s2, BACK: tl.constexpr, like):
    """The pairs (x1, x2) by their angles, or back, each step rounded to the dtype of `like`."""
    kind: tl.constexpr = like.dtype.element_ty
    a, b = (x1 * c1).to(kind).to(tl.float32), (x2 * c2).to(kind).to(tl.float32)
    if BACK:
        y1 = a + (x2 * s2).to(kind).to(tl.float32)
        y2 = b - (x1 * s1).to(kind).to(tl.float32)
    else:
        y1 = a - (x2 * s1).to(kind).to(tl.float32)
        y2 = b + (x1 * s2).to(kind).to(tl.float32)
    return y1.to(kind).to(tl.float32), y2.to(kind).to(tl.float32)


@triton.jit
def turn(
    x,
    cos,
    sin,
    out,
    head_stride,
    heads,
    first,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Heads from `first` on of the token at `x`, into `out` (heads, 2 * HALF + REST)."""
    head = first + tl.arange(0, HEADS)[:, None]
    there = head < heads
    source, target = x + head * head_stride, out + head * (2 * HALF + REST)
    half = tl.arange(0, BLOCK)
    c1 = tl.load(cos + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    if NEIGHBOURS:
        col = tl.arange(0, 2 * BLOCK)[None, :]
        inside = there & (col < 2 * HALF)
        pairs = tl.load(source + col, mask=inside, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(pairs, (HEADS, BLOCK, 2)))
        y1, y2 = turned(x1, x2, c1, c1, s1, s1, BACK, cos)
        both = tl.reshape(tl.join(y1, y2), (HEADS, 2 * BLOCK))
        tl.store(target + col, both.to(out.dtype.element_ty), mask=inside)
    else:
        inside = there & (half < HALF)[None, :]
        col = half[None, :]
        c2 = tl.load(cos + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
        x1 = tl.load(source + col, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + HALF + col, mask=inside, other=0.0).to(tl.float32)
        y1, y2 = turned(x1, x2, c1, c2, s1, s2, BACK, cos)
        tl.store(target + col, y1.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + col, y2.to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        col = tl.arange(0, REST_BLOCK)[None, :]
        inside = there & (col < REST)
        rest = tl.load(source + 2 * HALF + col, mask=inside, other=0.0)
        tl.store(target + 2 * HALF + col, rest, mask=inside)


@triton.jit(do_not_specialize=["length"])
def rotate_heads(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    length,
    q_heads,
    k_heads,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    angle_row,
    angle_token,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BACK: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Queries, and keys where there are any, by strides of rows, tokens and heads.

    The results (B, T, heads, d) are contiguous. Programs: a token, and a group of heads.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, t = token // length, token % length
    d: tl.constexpr = 2 * HALF + REST
    cos += row * angle_row + t * angle_token
    sin += row * angle_row + t * angle_token
    groups = tl.cdiv(q_heads, HEADS)
    if group < groups:
        source, target = q + row * q_row + t * q_token, q_out + token * (q_heads * d)
        turn(source, cos, sin, target, q_head, q_heads, group * HEADS, HALF, REST, NEIGHBOURS,
             BACK, HEADS, BLOCK, REST_BLOCK)  # fmt: skip
    elif KEYS:
        source, target = k + row * k_row + t * k_token, k_out + token * (k_heads * d)
        turn(source, cos, sin, target, k_head, k_heads, (group - groups) * HEADS, HALF, REST,
             NEIGHBOURS, BACK, HEADS, BLOCK, REST_BLOCK)  # fmt: skip


def launch_rotate(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    neighbours: bool,
    back: bool,
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    """`q` and `k` (B, T, heads, d) by cos and sin (B or 1, T, width) into tensors like them."""
    rows, length, q_heads, d = q.shape
    k_heads = 0 if k is None else k.shape[2]
    half = cos.shape[-1] // 2
    block, rest = triton.next_power_of_2(half), d - 2 * half
    heads = min(triton.next_power_of_2(q_heads), max(1, PAIRS // block))
    groups = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    rotate_heads[(rows * length, groups)](
        *(q, k, cos, sin, q_out, k_out, length, q_heads, k_heads),
        *(*q.stride()[:3], *((0, 0, 0) if k is None else k.stride()[:3])),
        *(cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
        HALF=half,
        REST=rest,
        NEIGHBOURS=neighbours,
        BACK=back,
        KEYS=k is not None,
        HEADS=heads,
        BLOCK=block,
        REST_BLOCK=triton.next_power_of_2(max(1, rest)),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )

"""Causal attention on CUDA by the fused kernels of torch, row by row, without a mask.

`attention_kernel` says which one a card takes:

    flash        16 bits from compute capability 8.0 on: keys are not repeated
    efficient    older cards, fp32 and wide heads. It has no grouped heads, and torch's own choice
                 for these is the math kernel, which holds (H, T, T) scores in fp32: so keys and
                 values are repeated for the kernel, and kept once.
    blocks       what neither does: soft caps, bf16 before 8.0 (`attention.py`)

Kept for backward are queries, keys, values, the output (B, T, H, d), and the logarithms of the
softmax's sums in fp32. Backward of long rows takes some key heads after others, each with the query
heads that share it: inside, the kernels hold gradients by queries in fp32, and the flash kernel
those by keys and values of every query head, which of all heads together are as large as half of
what else is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.device.target import Capability, has_values, representative
from qlora_kit.kernels.attention_blocks import like_heads
from qlora_kit.kernels.attention_ops import (
    attend_by_kernel,
    attend_by_kernel_backward,
    sums_of_heads,
)

HEADS_AND_TOKENS = 2**17
"""Query heads times tokens that one call of a kernel's backward takes, about: with heads of 128 it
takes 0.13 GB inside. That is 1,024 blocks of the flash kernel, more than a card runs at once."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch (B, T), one after the other: B * T positions in all.

    `lengths` has those of each sequence. `starts` (N + 1,) int32 on the batch's device says where
    each of the N rows begins in the batch, and where the last one ends (`cu_seqlens`).
    """

    lengths: Sequence[Sequence[int]]
    starts: Tensor


def attention_kernel(
    card: Capability,
    dtype: torch.dtype,
    head_size: int,
    softcap: float | None = None,
    drops: bool = False,
) -> str:
    """`flash`, `efficient` or `blocks`: what a card of this compute capability attends by.

    Packs and sliding windows change nothing: each of the three has both. `drops` says that the
    base has dropout of attention.
    Source: torch's sdp_utils.cpp, the checks of dtype, hardware and head size.
    """
    in_16_bits = dtype in (torch.float16, torch.bfloat16)
    if softcap is not None or head_size % 8 or not (in_16_bits or dtype is torch.float32):
        return "blocks"
    # Backward of these widths needs more shared memory than a block has there.
    small = (8, 6) <= card <= (8, 9) or card >= (12, 0)
    too_wide = head_size > 256 or (small and head_size > 192 and (drops or head_size <= 224))
    if in_16_bits and card >= (8, 0) and not too_wide:
        return "flash"
    return "blocks" if dtype is torch.bfloat16 and card < (8, 0) else "efficient"


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kernel: str,
    rows: Rows | None = None,
    window: int | None = None,
    spends_grad: bool = False,
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) to (B, H, T, d), row by row.

    `kernel` is `flash` or `efficient`. Without `rows` each sequence is one. A query sees `window`
    keys at most, its own included. `spends_grad` says that nobody else has the gradient by the
    output, so that the one by the queries may take its place.
    """
    batch, _, length, _ = query.shape
    lengths = [length] * batch if rows is None else [n for one in rows.lengths for n in one]
    window = None if window is None or window >= max(lengths) else window
    starts = query.new_empty(0, dtype=torch.int32) if rows is None else rows.starts
    options = lengths, scale, kernel, window
    return _Attend.apply(query, key, value, spends_grad, starts, *options)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """Repeats keys and values for the kernel that needs it, in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spends_grad: bool,
        starts: Tensor,
        *options: Any,
    ) -> Tensor:
        ctx.spends_grad, ctx.options = spends_grad, (starts, *options)
        *_, ctx.kernel, _ = options
        repeated = _repeated(query, key, value, ctx.kernel)
        output: Tensor
        output, sums = attend_by_kernel(query, *repeated, starts, *options)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        (grad,), others = grads, (None,) * (1 + len(ctx.options))
        pieces = _pieces(query, key)
        if len(pieces) == 1 and not ctx.spends_grad:
            return *_gradients(grad, query, key, value, output, sums, *ctx.options), *others
        lengths = ctx.options[1]
        by_query = grad if ctx.spends_grad else like_heads(query)
        by_key, by_value = like_heads(key), like_heads(value)
        for queries, keys in representative(pieces, query):
            parts = (grad[:, queries], query[:, queries], key[:, keys], value[:, keys])
            of_heads = sums_of_heads(sums, query, lengths, ctx.kernel, queries)
            found = _gradients(*parts, output[:, queries], of_heads, *ctx.options)
            for into, heads in ((by_query, queries), (by_key, keys), (by_value, keys)):
                into[:, heads].copy_(found.pop(0))  # gone before the next one is copied
        return by_query, by_key, by_value, *others


def _pieces(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """The query heads and the key heads that backward takes at once, which share no others."""
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    shared = heads // groups
    step = max(1, HEADS_AND_TOKENS // (shared * batch * length))
    ends = ((first, min(first + step, groups)) for first in range(0, groups, step))
    return [(slice(first * shared, end * shared), slice(first, end)) for first, end in ends]


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    *options: Any,
) -> list[Tensor]:
    """Those by query, key and value, by one call of a kernel; `options` begin with the rows."""
    *_, kernel, _ = options
    repeated = _repeated(query, key, value, kernel)
    inside = [] if has_values(query) else _inside(query, key, kernel)
    found = attend_by_kernel_backward(grad, query, *repeated, output, sums, *options)
    del inside, repeated
    by_query, *by_others = found
    # (B, H, T, d) to (B, H / n, n, T, d), and the sum over the heads that share a key.
    summed = (
        x if x.shape == key.shape else x.unflatten(1, (key.shape[1], -1)).sum(2) for x in by_others
    )
    return [by_query, *summed]


def _inside(query: Tensor, key: Tensor, kernel: str) -> list[Tensor]:
    """What a kernel takes inside, as a plan sees it: in a run nobody but the allocator does.

    Source: torch's flash_api.cpp (`dq_accum`, `dk_expanded`) and attention_backward.cu (the
    workspace of gradients by queries).
    """
    by_query = [query.new_empty(query.shape, dtype=torch.float32)]
    if kernel != "flash" or key.shape == query.shape:
        return by_query
    return [*by_query, torch.empty_like(query), torch.empty_like(query)]


def _repeated(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H / n, T, d), for every query head where the kernel needs that."""
    times = query.shape[1] // key.shape[1]
    if kernel == "flash" or times == 1:
        return key, value
    # (B, H / n, T, d) to (B, H, T, d) that lies in memory as (B, T, H, d).
    by_token = (x.transpose(1, 2).repeat_interleave(times, 2) for x in (key, value))
    keys, values = (x.transpose(1, 2) for x in by_token)
    return keys, values

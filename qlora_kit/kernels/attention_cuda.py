"""Causal attention on CUDA by the fused kernels of torch, row by row, without a mask.

`attention_kernel` says which one a card takes:

    flash        16 bits from compute capability 8.0 on: keys are not repeated
    efficient    older cards, fp32 and wide heads. It has no grouped heads, and torch's own choice
                 for these is the math kernel, which holds (H, T, T) scores in fp32: so keys and
                 values are repeated for the kernel, and kept once.
    blocks       what neither does: soft caps, bf16 before 8.0 (`attention.py`)

Kept for backward are queries, keys, values, the output (B, T, H, d), and the logarithms of the
softmax's sums in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.device.target import Capability
from qlora_kit.kernels.attention_ops import attend_by_kernel, attend_by_kernel_backward


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
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) to (B, H, T, d), row by row.

    `kernel` is `flash` or `efficient`. Without `rows` each sequence is one. A query sees `window`
    keys at most, its own included.
    """
    batch, _, length, _ = query.shape
    lengths = [length] * batch if rows is None else [n for one in rows.lengths for n in one]
    window = None if window is None or window >= max(lengths) else window
    starts = query.new_empty(0, dtype=torch.int32) if rows is None else rows.starts
    return _Attend.apply(query, key, value, starts, lengths, scale, kernel, window)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """Repeats keys and values for the kernel that needs it, in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *options: Any
    ) -> Tensor:
        ctx.options = starts, *options
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
        repeated = _repeated(query, key, value, ctx.kernel)
        by_query, *by_others = attend_by_kernel_backward(
            grads[0], query, *repeated, output, sums, *ctx.options
        )
        # (B, H, T, d) to (B, H / n, n, T, d), and the sum over the heads that share a key.
        by_key, by_value = (
            x if x.shape == key.shape else x.unflatten(1, (key.shape[1], -1)).sum(2)
            for x in by_others
        )
        return by_query, by_key, by_value, *(None,) * len(ctx.options)


def _repeated(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H / n, T, d), for every query head where the kernel needs that."""
    times = query.shape[1] // key.shape[1]
    if kernel == "flash" or times == 1:
        return key, value
    # (B, H / n, T, d) to (B, H, T, d) that lies in memory as (B, T, H, d).
    by_token = (x.transpose(1, 2).repeat_interleave(times, 2) for x in (key, value))
    keys, values = (x.transpose(1, 2) for x in by_token)
    return keys, values

"""Causal attention within segments, keys kept once a group of heads: the library's kernels or ours.

On a GPU ours serves what no kernel there does (`attention_cuda.py`): soft caps. Sliding windows and
soft caps are ours on the CPU, too. What follows is about the CPU without them.

The library's backward keeps keys and values repeated for every query head, and is slow for narrow
heads. Ours (`attention_blocks.py`) recomputes the scores and keeps queries, keys and values only:
neither the output nor any statistics. On a processor with matrix tiles (AMX) the library is the
faster one in forward, and for wide heads both ways; then its output and statistics are kept.
Without tiles a layer of the 1b shape takes 8.1 ms and 17.6 backward, the library 15.4 and 34.6, on
an AMD EPYC with AVX512-BF16. Processors with less were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.device.target import TILES, device_type, representative
from qlora_kit.kernels.attention_blocks import (
    NARROW,
    backward_in_blocks,
    block_limits,
    forward_in_blocks,
    forward_space,
    like_heads,
)
from qlora_kit.kernels.matmul import matmul_dtype


@dataclass(frozen=True)
class Segment:
    """A row of a pack: sequences `batch`, positions `start` to `end`; attention stays within."""

    batch: slice
    start: int
    end: int

    def of(self, x: Tensor) -> Tensor:
        """This part of (B, heads, T, ...): (sequences, heads, end - start, ...)."""
        return x[self.batch, :, self.start : self.end]

    def shape(self, x: Tensor) -> tuple[int, int]:
        """Its sequences and its positions in a batch (B, heads, T, ...)."""
        return len(range(*self.batch.indices(x.shape[0]))), self.end - self.start


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    segments: Sequence[Segment],
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) to (B, H, T, d), row by row.

    The segments cover the whole batch; no position sees another segment or a later position, or
    more than `window` keys, its own included. `softcap` is the one of the scores.
    """
    longest = max(segment.end - segment.start for segment in segments)
    window = None if window is None or window >= longest else window
    return _CausalAttention.apply(query, key, value, scale, segments, window, softcap)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    """One of two kernels each way: the library's or ours, by processor, dtype and width of heads.

    Several segments are one operation (`attend_rows`), so that recomputation can keep its result.
    Backward takes segment after segment, and of each as many key heads at once as keep the scores
    about `BLOCK_SCORES`: each part's gradients are copied into those of the whole batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        segments: Sequence[Segment],
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.scale, ctx.segments, ctx.window, ctx.softcap = scale, segments, window, softcap
        result: Tensor
        normalizer: Tensor | None = None
        plain = window is None and softcap is None
        if not (by_library := plain and _by_library(query)):
            space = forward_space(query, key, {one.shape(query) for one in segments}, window)
        if len(segments) > 1:
            borders = zip(*((s.batch.start, s.start, s.end) for s in segments), strict=True)
            if by_library:
                space = query.new_empty(0, dtype=torch.float32)
            rows = *map(list, borders), window, softcap, by_library
            result, normalizer = attend_rows(query, key, value, space, scale, *rows)
        elif by_library:
            result, normalizer = _library_forward(query, key, value, scale)
        else:
            result = attend_in_blocks(query, key, value, space, scale, window, softcap)
        ours = not plain or _backward_is_ours(query)
        ctx.save_for_backward(query, key, value, *(() if ours else (result, normalizer)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *others = ctx.saved_tensors
        results = [like_heads(x) for x in (query, key, value)]
        for segment in representative(ctx.segments, query):
            q, k, v, grad = (segment.of(x) for x in (query, key, value, grads[0]))
            into = [segment.of(x) for x in results]
            if others:
                output, normalizer = (segment.of(x) for x in others)
                _place(into, _library_backward(grad, q, k, v, output, normalizer, ctx.scale))
                continue
            shared, length = q.shape[1] // k.shape[1], k.shape[2]
            most_queries, most_scores = block_limits(q, backward=True)
            seen = length if ctx.window is None else min(length, most_queries + ctx.window - 1)
            scores = q.shape[0] * shared * min(length, most_queries) * seen
            step = max(1, most_scores // scores)  # key heads that are taken at once
            for first in range(0, k.shape[1], step):
                keys = slice(first, first + step)
                queries = slice(first * shared, (first + step) * shared)
                parts = (q[:, queries], k[:, keys], v[:, keys], grad[:, queries])
                of_heads = [x[:, y] for x, y in zip(into, (queries, keys, keys), strict=True)]
                _place(of_heads, backward_in_blocks(*parts, ctx.scale, ctx.window, ctx.softcap))
        return *results, None, None, None, None


def _place(into: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Copies gradients, which are gone before the next ones are computed."""
    for result, gradient in zip(into, gradients, strict=True):
        result.copy_(gradient)


def _by_library(query: Tensor) -> bool:
    """Whether forward is the library's kernel, where there is neither a window nor a soft cap."""
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    there = device_type(query) == "cpu"
    return there and (not in_16_bits or (TILES and matmul_dtype(query) is query.dtype))


def _backward_is_ours(query: Tensor) -> bool:
    """Whether backward is ours, which needs neither the output nor statistics."""
    if device_type(query) != "cpu":
        return True
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and (not _by_library(query) or query.shape[-1] <= NARROW)


@torch.library.custom_op("qlora_kit::attend_rows", mutates_args=("space",))
def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    space: Tensor,
    scale: float,
    sequences: list[int],
    starts: list[int],
    ends: list[int],
    window: int | None,
    softcap: float | None,
    by_library: bool,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, d) and the statistics (B, H, T) of packs, row after row.

    One operation, so that a level of recompute can keep its results, and so that a step takes the
    same however its packs are divided. No plan sees what a row takes inside: its output, and its
    keys and values for every query head, or what `attend_in_blocks` takes. Ours has no statistics.
    """
    result, normalizer = like_heads(query), _statistics(query, by_library)
    for sequence, start, end in zip(sequences, starts, ends, strict=True):
        segment = Segment(slice(sequence, sequence + 1), start, end)
        q, k, v = (segment.of(x) for x in (query, key, value))
        if by_library:
            output, statistics = _library_forward(q, k, v, scale)
            segment.of(normalizer).copy_(statistics)
        else:
            output = forward_in_blocks(q, k, v, scale, space, window, softcap)
        segment.of(result).copy_(output)
    return result, normalizer


@attend_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, space: Tensor, *options: Any) -> Any:
    *_, by_library = options
    return like_heads(query), _statistics(query, by_library)


@torch.library.custom_op("qlora_kit::attend_in_blocks", mutates_args=("space",))
def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    space: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) of one segment to (B, H, T, d).

    One operation, so that a level of recompute can keep its result. The scores lie in `space`. No
    plan sees the rest of what it takes inside: a part's keys in fp32, and a block of queries.
    """
    return forward_in_blocks(query, key, value, scale, space, window, softcap)


@attend_in_blocks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, space: Tensor, *options: Any) -> Tensor:
    return like_heads(query)


ATTEND_IN_BLOCKS = torch.ops.qlora_kit.attend_in_blocks.default
ATTEND_ROWS = torch.ops.qlora_kit.attend_rows.default


def _statistics(query: Tensor, by_library: bool) -> Tensor:
    """Room (B, H, T) for the logarithms of the softmax's sums, which the library's backward reads;

    (B, H, 0) where ours does not.
    """
    count = query.shape[2] if by_library else 0
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:2], count, dtype=dtype)


def _library_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The library's output (B, H, T, d) and statistics (B, H, T) of one segment."""
    repeated = _repeated(key, value, query.shape[1] // key.shape[1])
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, *repeated, 0.0, True, scale=scale)  # type: ignore[no-any-return]


def _library_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_in_blocks`, by the library's kernel, which reads `output` and `normalizer`."""
    shared = query.shape[1] // key.shape[1]
    repeated = _repeated(key, value, shared)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_query, *by_others = backward(
        grad, query, *repeated, output, normalizer, 0.0, True, scale=scale
    )
    # (B, H, T, d) to (B, H / n, n, T, d), and the sum over the heads that share a key.
    by_key, by_value = (
        x if shared == 1 else x.unflatten(1, (-1, shared)).sum(2) for x in by_others
    )
    return by_query, by_key, by_value


def _repeated(key: Tensor, value: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H / n, T, d) for every query head, (B, H, T, d): the library's form."""
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)

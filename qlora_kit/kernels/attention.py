"""Causal attention within rows for 16-bit tensors on the CPU, where keys are kept once a group.

The library's backward keeps keys and values repeated for every query head, and is slow for narrow
heads. Ours makes the scores of some queries again, for all heads that share a key at once, and
keeps queries, keys and values only: neither the output nor any statistics. Scores above the
diagonal blocks are never made. Forward is made in the same way, with scores in fp32. On a processor
with matrix tiles (AMX) the library is the faster one in forward, and for wide heads both ways.
Source: Dao et al., FlashAttention (arXiv 2205.14135), for recomputing scores in blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.device import representative
from qlora_kit.kernels.matmul import matmul_dtype

TILES = torch.cpu._is_amx_tile_supported()  # torch 2.13 has no public name for it
"""Without, a layer of the 1b shape takes 8.1 ms and 17.6 backward, the library 15.4 and 34.6, on an
AMD EPYC with AVX512-BF16. Processors with less were not measured."""
NARROW = 64
"""With tiles, head widths up to here take our backward: 11.6 against 18.5 ms a layer of the 1b
shape; at width 128 the library's takes 13 against 25 ms. Forward takes 3.9 ms in the library."""
BLOCK_QUERIES = 128
BLOCK_SCORES = 2**22
"""Scores that are held at once, about: 12.6 ms a layer of the 1b shape; with 2**20, 15.7 ms."""
FORWARD_QUERIES = 64
FORWARD_SCORES = 2**20


@dataclass(frozen=True)
class Segment:
    """A row of a pack: sequences `batch`, positions `start` to `end`; attention stays within."""

    batch: slice
    start: int
    end: int

    def of(self, x: Tensor) -> Tensor:
        """This part of (B, heads, T, d)."""
        return x[self.batch, :, self.start : self.end]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Sequence[Segment]
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) to (B, H, T, d), row by row.

    The segments cover the whole batch; no position sees another segment or a later position.
    """
    return _CausalAttention.apply(query, key, value, scale, segments)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        segments: Sequence[Segment],
    ) -> Tensor:
        ctx.scale, ctx.segments = scale, segments
        result: Tensor
        normalizer: Tensor | None = None
        if len(segments) > 1:
            borders = zip(*((s.batch.start, s.start, s.end) for s in segments), strict=True)
            result, normalizer = attend_rows(query, key, value, scale, *map(list, borders))
        elif _by_library(query):
            result, normalizer = _library_forward(query, key, value, scale)
        else:
            result = attend_in_blocks(query, key, value, scale)
        ours = _backward_is_ours(query)
        ctx.save_for_backward(query, key, value, *(() if ours else (result, normalizer)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *others = ctx.saved_tensors
        results = [_like_heads(x) for x in (query, key, value)]
        for segment in ctx.segments:
            q, k, v, grad = (segment.of(x) for x in (query, key, value, grads[0]))
            into = [segment.of(x) for x in results]
            if others:
                output, normalizer = (segment.of(x) for x in others)
                gradients = _library_backward(grad, q, k, v, output, normalizer, ctx.scale)
                for result, gradient in zip(into, gradients, strict=True):
                    result.copy_(gradient)
                continue
            shared, length = q.shape[1] // k.shape[1], k.shape[2]
            scores = q.shape[0] * shared * min(length, BLOCK_QUERIES) * length
            step = max(1, BLOCK_SCORES // scores)  # heads of keys that are taken at once
            for first in range(0, k.shape[1], step):
                keys = slice(first, first + step)
                queries = slice(first * shared, (first + step) * shared)
                parts = (q[:, queries], k[:, keys], v[:, keys], grad[:, queries])
                gradients = _backward(*parts, ctx.scale)
                for result, heads, gradient in zip(
                    into, (queries, keys, keys), gradients, strict=True
                ):
                    result[:, heads].copy_(gradient)
        return *results, None, None


def _by_library(query: Tensor) -> bool:
    """Whether forward is the library's kernel."""
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    return not in_16_bits or (TILES and matmul_dtype(query) is query.dtype)


def _backward_is_ours(query: Tensor) -> bool:
    """Whether backward is ours, which needs neither the output nor statistics."""
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and (not _by_library(query) or query.shape[-1] <= NARROW)


@torch.library.custom_op("qlora_kit::attend_rows", mutates_args=())
def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sequences: list[int],
    starts: list[int],
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, d) and the statistics (B, H, T) of packs, row after row.

    One operation, so that a level of recompute can keep its results, and so that a step takes the
    same however its packs are divided. No plan sees what a row takes inside: its output, and its
    keys and values for every query head, or what `attend_in_blocks` takes. Ours has no statistics.
    """
    result, normalizer = _like_heads(query), _statistics(query)
    for sequence, start, end in zip(sequences, starts, ends, strict=True):
        segment = Segment(slice(sequence, sequence + 1), start, end)
        q, k, v = (segment.of(x) for x in (query, key, value))
        if _by_library(query):
            output, found = _library_forward(q, k, v, scale)
            segment.of(normalizer).copy_(found)
        else:
            output = _attend_in_blocks(q, k, v, scale)
        segment.of(result).copy_(output)
    return result, normalizer


@attend_rows.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sequences: list[int],
    starts: list[int],
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    return _like_heads(query), _statistics(query)


def _statistics(query: Tensor) -> Tensor:
    """Room for the logarithm of every row's sum, which the library's backward reads."""
    count = query.shape[2] if _by_library(query) else 0
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:2], count, dtype=dtype)


def _library_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The library's output and statistics of one segment."""
    repeated = _repeated(key, value, query.shape[1] // key.shape[1])
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, *repeated, 0.0, True, scale=scale)  # type: ignore[no-any-return]


@torch.library.custom_op("qlora_kit::attend_in_blocks", mutates_args=())
def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) of one segment to (B, H, T, d).

    One operation, so that a level of recompute can keep its result. No plan sees what it takes
    inside: `FORWARD_SCORES` in fp32 and in 16 bits (6 MiB; more once n * T is above that number),
    and the part's keys in fp32 and its block of queries.
    """
    return _attend_in_blocks(query, key, value, scale)


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, length, width = key.shape
    shared, result, dtype = query.shape[1] // heads, _like_heads(query), matmul_dtype(query)
    step = max(1, min(length, FORWARD_QUERIES, FORWARD_SCORES // (shared * length)))
    parts = max(1, FORWARD_SCORES // (shared * step * length))  # keys of one head of one sequence
    some_heads, some_rows = min(heads, parts), max(1, parts // heads)
    # The same memory for all blocks: fresh pages would cost more than what is written to them.
    held = min(some_rows, batch) * some_heads * shared * step * length
    space = torch.empty(held, dtype=torch.float32, device=query.device)
    rounded = space if dtype is torch.float32 else torch.empty_like(space, dtype=dtype)
    for row, head in itertools.product(range(0, batch, some_rows), range(0, heads, some_heads)):
        of = (slice(row, row + some_rows), slice(head, head + some_heads))
        queries = (of[0], slice(head * shared, (head + some_heads) * shared))
        keys, values = key[of].flatten(0, 1).float(), value[of].flatten(0, 1).to(dtype)
        for start in range(0, length, step):
            end = min(start + step, length)
            q = query[queries][:, :, start:end]
            # Queries that share a key follow one another: (keys, shared * rows, d).
            rows = (q.float() * scale).reshape(keys.shape[0], -1, width)
            shape = (*rows.shape[:2], end)
            scores, share = (x[: math.prod(shape)].view(shape) for x in (space, rounded))
            torch.bmm(rows, keys[:, :end].transpose(1, 2), out=scores)
            _hide_later(scores.view(len(keys), shared, -1, end))
            torch.softmax(scores, -1, out=scores)
            if rounded is not space:
                share.copy_(scores)
            result[queries][:, :, start:end].copy_((share @ values[:, :end]).view(q.shape))
    return result


@attend_in_blocks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return _like_heads(query)


ATTEND_IN_BLOCKS = torch.ops.qlora_kit.attend_in_blocks.default
ATTEND_ROWS = torch.ops.qlora_kit.attend_rows.default


def _hide_later(scores: Tensor) -> None:
    """Scores (..., count, end) of the last `count` queries: what comes after each becomes -inf."""
    count = scores.shape[-2]
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device)
    scores[..., scores.shape[-1] - count :].add_(later.triu_(1))


def _repeated(key: Tensor, value: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Keys and values for every query head, which the library asks for."""
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _library_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, by the library's kernel."""
    shared = query.shape[1] // key.shape[1]
    repeated = _repeated(key, value, shared)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_query, *by_others = backward(
        grad, query, *repeated, output, normalizer, 0.0, True, scale=scale
    )
    by_key, by_value = (
        one if shared == 1 else one.unflatten(1, (-1, shared)).sum(2) for one in by_others
    )
    return by_query, by_key, by_value


def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query (B, H, T, d), key and value (B, H / n, T, d) of one segment.

    Of wide heads the scores are made in fp32. Those of narrow ones are rounded to 16 bits, as
    transformers' eager attention does; their product takes 1.7 against 3.5 ms a layer of the 1b
    shape. So bf16 gradients of narrow heads are 0.4 % from exact with scores around 1 and 2 %
    around 8, where the library's are 0.4 and 0.5 %.
    """
    query, key, value, grad = (x.to(matmul_dtype(x)) for x in (query, key, value, grad))
    batch, heads, length, width = key.shape
    groups, shared = batch * heads, query.shape[1] // heads
    keys, values = (x.reshape(groups, length, width) for x in (key, value))
    grad_query = torch.empty_like(query)
    # The same memory for all blocks, as in forward.
    space = query.new_empty(2, groups * shared * min(BLOCK_QUERIES, length) * length)
    exact = torch.float32 if width > NARROW else query.dtype
    raw = space[0] if exact is query.dtype else torch.empty_like(space[0], dtype=exact)
    exact_keys = keys.to(exact)
    grad_key, grad_value = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values)
    )
    for start in representative(range(0, length, BLOCK_QUERIES), query):
        end = min(start + BLOCK_QUERIES, length)
        count = end - start
        # Queries that share a key follow one another: (groups, shared * count, d).
        rows = (groups, shared * count, width)
        q = (query[:, :, start:end].to(exact) * scale).reshape(rows)
        g = grad[:, :, start:end].reshape(rows)
        shape = (groups, shared * count, end)
        scores, share, grad_share = (x[: math.prod(shape)].view(shape) for x in (raw, *space))
        torch.bmm(q, exact_keys[:, :end].transpose(1, 2), out=scores)
        _hide_later(scores.view(groups, shared, count, end))
        torch.softmax(scores, -1, out=scores)
        if exact is not query.dtype:
            share.copy_(scores)
            q = q.to(query.dtype)
        grad_value[:, :end] += share.transpose(1, 2) @ g
        torch.bmm(g, values[:, :end].transpose(1, 2), out=grad_share)
        grad_scores = torch._softmax_backward_data(
            grad_share, share, -1, share.dtype, grad_input=grad_share
        )
        grad_key[:, :end] += grad_scores.transpose(1, 2) @ q
        grad_query[:, :, start:end] = (
            (grad_scores @ keys[:, :end]).mul_(scale).view(batch, -1, count, width)
        )
    return grad_query, grad_key.view_as(key), grad_value.view_as(value)


def _like_heads(x: Tensor) -> Tensor:
    """An empty (B, heads, T, d) that lies in memory as (B, T, heads, d), as projections do."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)

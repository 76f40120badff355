"""Causal attention within rows for 16-bit tensors on the CPU, where keys are kept once a group.

Forward is the library's. Its backward keeps keys and values repeated for every query head, and is
slow for narrow heads. Ours makes the scores of some queries again, for all heads that share a key
at once, and keeps queries, keys and values only: neither the output nor any statistics. Scores
above the diagonal blocks are never made. For wide heads the library's backward is the faster one.
Source: Dao et al., FlashAttention (arXiv 2205.14135), for recomputing scores in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NARROW = 64
"""Head widths up to here take our backward: 11.6 against 18.5 ms a layer of the 1b shape; at width
128 the library's takes 13 against 25 ms."""
BLOCK_QUERIES = 128
BLOCK_SCORES = 2**22
"""Scores that are held at once, about: 12.6 ms a layer of the 1b shape; with 2**20, 15.7 ms."""


@dataclass(frozen=True)
class Stretch:
    """Sequences `batch` of a batch, positions `start` to `end`: attention stays within."""

    batch: slice
    start: int
    end: int

    def of(self, x: Tensor) -> Tensor:
        """This part of (B, heads, T, d)."""
        return x[self.batch, :, self.start : self.end]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, stretches: Sequence[Stretch]
) -> Tensor:
    """Queries (B, H, T, d), keys and values (B, H / n, T, d) to (B, H, T, d), row by row.

    The stretches cover the whole batch; no position sees another stretch or a later position.
    """
    return _CausalAttention.apply(query, key, value, scale, stretches)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        stretches: Sequence[Stretch],
    ) -> Tensor:
        ctx.scale, ctx.stretches = scale, stretches
        shared = query.shape[1] // key.shape[1]
        outputs, sums = [], []
        for stretch in stretches:
            q, k, v = (stretch.of(x) for x in (query, key, value))
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            output, normalizer = attend(q, *_repeated(k, v, shared), 0.0, True, scale=scale)
            outputs.append(output)
            sums.append(normalizer)
        if len(outputs) == 1:
            result: Tensor = outputs[0]
        else:
            result = _like_heads(query)
            for stretch, output in zip(stretches, outputs, strict=True):
                stretch.of(result).copy_(output)
        narrow = query.shape[-1] <= NARROW
        ctx.save_for_backward(query, key, value, *(() if narrow else (result, *sums)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *others = ctx.saved_tensors
        results = [_like_heads(x) for x in (query, key, value)]
        for number, stretch in enumerate(ctx.stretches):
            q, k, v, grad = (stretch.of(x) for x in (query, key, value, grads[0]))
            into = [stretch.of(x) for x in results]
            if others:
                output, normalizer = stretch.of(others[0]), others[1 + number]
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
    """Gradients by query (B, H, T, d), key and value (B, H / n, T, d) of one stretch."""
    batch, heads, length, width = key.shape
    groups, shared = batch * heads, query.shape[1] // heads
    keys, values = (x.reshape(groups, length, width) for x in (key, value))
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values)
    )
    for start in range(0, length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, length)
        count = end - start
        # Queries that share a key follow one another: (groups, shared * count, d).
        rows = (groups, shared * count, width)
        q = (query[:, :, start:end] * scale).reshape(rows)
        g = grad[:, :, start:end].reshape(rows)
        scores = q @ keys[:, :end].transpose(1, 2)
        later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device)
        scores.view(groups, shared, count, end)[..., start:].add_(later.triu_(1))
        share = scores.softmax(-1)
        grad_value[:, :end] += share.transpose(1, 2) @ g
        grad_share = g @ values[:, :end].transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_share, share, -1, share.dtype)
        grad_key[:, :end] += grad_scores.transpose(1, 2) @ q
        grad_query[:, :, start:end] = (
            (grad_scores @ keys[:, :end]).mul_(scale).view(batch, -1, count, width)
        )
    return grad_query, grad_key.view_as(key), grad_value.view_as(value)


def _like_heads(x: Tensor) -> Tensor:
    """An empty (B, heads, T, d) that lies in memory as (B, T, heads, d), as projections do."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)

"""Causal attention of one segment, block of queries by block of queries: forward and backward.

Shapes: queries (B, H, T, d), keys and values (B, G, T, d), where n = H / G query heads share each
key head. Heads that share a key are folded into the queries, (B * G, n * T, d), so that one matmul
serves them all and keys are never repeated. A block is a number of queries with all keys up to its
last query: scores above the diagonal blocks are never computed.

Backward keeps queries, keys and values only. It computes the scores S = scale * Q K^T of a block
again, and their softmax P, and then, with dO the gradient by the output:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - sum(P * dP))
    dQ = scale * dS K  dK = scale * dS^T Q

A softmax that is recomputed whole needs neither the output nor the logarithms of its sums, which
FlashAttention keeps for a block-wise one: so neither is kept, and attention's output is kept only
where an adapter of the output projection reads it.
Source: Dao et al., FlashAttention (arXiv 2205.14135), for recomputing scores in blocks.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from qlora_kit.device.target import representative
from qlora_kit.kernels.matmul import matmul_dtype

NARROW = 64
"""With matrix tiles, head widths up to here take our backward: 11.6 against 18.5 ms a layer of the
1b shape; at width 128 the library's takes 13 against 25 ms. Forward takes 3.9 ms in the library."""
BLOCK_QUERIES = 128
BLOCK_SCORES = 2**22
"""Scores that are held at once, about: 12.6 ms a layer of the 1b shape; with 2**20, 15.7 ms."""
FORWARD_QUERIES = 64
FORWARD_SCORES = 2**20


def forward_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The output (B, H, T, d), with scores in fp32; shapes as above.

    `FORWARD_SCORES` bound a block: `some_rows` sequences, `some_heads` key heads, `step` queries.
    """
    batch, heads, length, width = key.shape
    shared, result, dtype = query.shape[1] // heads, like_heads(query), matmul_dtype(query)
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
        # (rows, key heads, T, d) to (groups, T, d), groups = rows * key heads.
        keys, values = key[of].flatten(0, 1).float(), value[of].flatten(0, 1).to(dtype)
        for start in range(0, length, step):
            end = min(start + step, length)
            q = query[queries][:, :, start:end]  # (rows, n * key heads, end - start, d)
            # Queries that share a key follow one another: (groups, n * (end - start), d).
            folded = (q.float() * scale).reshape(keys.shape[0], -1, width)
            shape = (*folded.shape[:2], end)  # of the scores
            scores, share = (x[: math.prod(shape)].view(shape) for x in (space, rounded))
            torch.bmm(folded, keys[:, :end].transpose(1, 2), out=scores)
            _hide_later(scores.view(len(keys), shared, -1, end))
            torch.softmax(scores, -1, out=scores)
            if rounded is not space:
                share.copy_(scores)
            # (groups, n * (end - start), d) back to the shape of q.
            result[queries][:, :, start:end].copy_((share @ values[:, :end]).view(q.shape))
    return result


def backward_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query (B, H, T, d), key and value (B, G, T, d); `grad` (B, H, T, d).

    Of wide heads the scores are computed in fp32. Those of narrow ones are rounded to 16 bits, as
    transformers' eager attention does; that matmul takes 1.7 against 3.5 ms a layer of the 1b
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
        # Queries that share a key follow one another: (groups, n * count, d).
        folded = (groups, shared * count, width)
        q = (query[:, :, start:end].to(exact) * scale).reshape(folded)
        g = grad[:, :, start:end].reshape(folded)
        shape = (groups, shared * count, end)  # of S, P and dP; dS takes the place of dP
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
        grad_key[:, :end] += grad_scores.transpose(1, 2) @ q  # q has the scale in it
        # (groups, n * count, d) back to (B, H, count, d).
        grad_query[:, :, start:end] = (
            (grad_scores @ keys[:, :end]).mul_(scale).view(batch, -1, count, width)
        )
    return grad_query, grad_key.view_as(key), grad_value.view_as(value)


def _hide_later(scores: Tensor) -> None:
    """Scores (..., count, end) of the last `count` queries: what comes after each becomes -inf."""
    count = scores.shape[-2]
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device)
    scores[..., scores.shape[-1] - count :].add_(later.triu_(1))


def like_heads(x: Tensor) -> Tensor:
    """An empty (B, heads, T, d) that lies in memory as (B, T, heads, d), as projections do."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)

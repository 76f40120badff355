"""Causal attention of one segment, block of queries by block of queries: forward and backward.

Shapes: queries (B, H, T, d), keys and values (B, G, T, d), where n = H / G query heads share each
key head. Heads that share a key are folded into the queries, (B * G, n * T, d), so that one matmul
serves them all and keys are never repeated. A block is a number of queries with the keys that they
see: scores above the diagonal blocks are never computed, nor those before a sliding window. So
what is held at once grows with T and not with its square, on any device.

Backward keeps queries, keys and values only. It computes the scores S = scale * Q K^T of a block
again, and their softmax P, and then, with dO the gradient by the output:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - sum(P * dP))
    dQ = scale * dS K  dK = scale * dS^T Q

A softmax that is recomputed whole needs neither the output nor the logarithms of its sums, which
FlashAttention keeps for a block-wise one: so neither is kept, and attention's output is kept only
where an adapter of the output projection reads it. Under a soft cap c the softmax is that of
c * tanh(S / c), and dS has the slope of that, 1 - tanh(S / c)^2, as a factor.
Source: Dao et al., FlashAttention (arXiv 2205.14135), for recomputing scores in blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from qlora_kit.device.target import device_type, representative
from qlora_kit.kernels.matmul import bmm_to_fp32, matmul_dtype

NARROW = 64
"""With matrix tiles, head widths up to here take our backward: 11.6 against 18.5 ms a layer of the
1b shape; at width 128 the library's takes 13 against 25 ms. Forward takes 3.9 ms in the library."""
BLOCK_QUERIES = 128
BLOCK_SCORES = 2**22
"""Scores that are held at once, about: 12.6 ms a layer of the 1b shape; with 2**20, 15.7 ms."""
FORWARD_QUERIES = 64
FORWARD_SCORES = 2**20
CUDA_QUERIES = 256
CUDA_SCORES = 2**23
"""Of a block on CUDA, both ways: at most 100 MB with all that is held of them. Not measured."""


def block_limits(x: Tensor, backward: bool) -> tuple[int, int]:
    """The most queries of a block, and about the most scores, on the device of `x`."""
    if device_type(x) == "cuda":
        return CUDA_QUERIES, CUDA_SCORES
    return (BLOCK_QUERIES, BLOCK_SCORES) if backward else (FORWARD_QUERIES, FORWARD_SCORES)


def forward_space(
    query: Tensor, key: Tensor, segments: Iterable[tuple[int, int]], window: int | None = None
) -> Tensor:
    """What `forward_in_blocks` works in, in fp32: the scores of a block, and as they are rounded.

    Enough for each of the segments of so many sequences and positions. The caller allocates it,
    so that whoever counts bytes around an operation sees them.
    """
    sizes = [_forward_sizes(query, key, *segment, window) for segment in segments]
    count = max(math.prod(size) for size in sizes) * (query.shape[1] // key.shape[1])
    rounded = 0 if matmul_dtype(query) is torch.float32 else (count + 1) // 2
    return torch.empty(count + rounded, dtype=torch.float32, device=query.device)


def forward_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    space: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The output (B, H, T, d), with scores in fp32; shapes as above.

    A query sees `window` keys at most, its own the last of them.
    """
    batch, heads, length, width = key.shape
    shared, result, dtype = query.shape[1] // heads, like_heads(query), matmul_dtype(query)
    some_rows, some_heads, step, seen = _forward_sizes(query, key, batch, length, window)
    held = some_rows * some_heads * shared * step * seen
    # The same memory for all blocks: fresh pages would cost more than what is written to them.
    rounded = space if dtype is torch.float32 else space[held:].view(dtype)
    for row, head in itertools.product(range(0, batch, some_rows), range(0, heads, some_heads)):
        of = (slice(row, row + some_rows), slice(head, head + some_heads))
        queries = (of[0], slice(head * shared, (head + some_heads) * shared))
        # (rows, key heads, T, d) to (groups, T, d), groups = rows * key heads.
        keys, values = _exact(key[of].flatten(0, 1)), value[of].flatten(0, 1).to(dtype)
        for start in range(0, length, step):
            end, first = min(start + step, length), _first_key(start, window)
            q = query[queries][:, :, start:end]  # (rows, n * key heads, end - start, d)
            # Queries that share a key follow one another: (groups, n * (end - start), d).
            folded = (_exact(q) * scale).reshape(keys.shape[0], -1, width)
            shape = (*folded.shape[:2], end - first)  # of the scores
            scores, share = (x[: math.prod(shape)].view(shape) for x in (space, rounded))
            bmm_to_fp32(folded, keys[:, first:end].transpose(1, 2), scores)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            hide(scores.view(len(keys), shared, -1, end - first), start - first, window)
            torch.softmax(scores, -1, out=scores)
            if rounded is not space:
                share.copy_(scores)
            # (groups, n * (end - start), d) back to the shape of q.
            result[queries][:, :, start:end].copy_((share @ values[:, first:end]).view(q.shape))
    return result


def backward_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query (B, H, T, d), key and value (B, G, T, d); `grad` (B, H, T, d).

    Of wide heads, and under a soft cap, the scores are computed in fp32. Others are rounded to 16
    bits, as transformers' eager attention does; that matmul takes 1.7 against 3.5 ms a layer of the
    1b shape. So bf16 gradients of narrow heads are 0.4 % from exact with scores around 1 and 2 %
    around 8, where the library's are 0.4 and 0.5 %.
    """
    query, key, value, grad = (x.to(matmul_dtype(x)) for x in (query, key, value, grad))
    batch, heads, length, width = key.shape
    groups, shared = batch * heads, query.shape[1] // heads
    keys, values = (x.reshape(groups, length, width) for x in (key, value))
    grad_query = torch.empty_like(query)
    step = min(block_limits(query, backward=True)[0], length)
    in_fp32 = width > NARROW or softcap is not None
    held = groups * shared * step * _seen(step, length, window)
    scores_of = _Scores(query, held, in_fp32, window, softcap)
    exact_keys = _exact(keys) if in_fp32 else keys
    grad_key, grad_value = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values)
    )
    for start in representative(range(0, length, step), query):
        end, first = min(start + step, length), _first_key(start, window)
        count, seen = end - start, slice(first, end)
        # Queries that share a key follow one another: (groups, n * count, d).
        folded = (groups, shared * count, width)
        q, g = query[:, :, start:end], grad[:, :, start:end].reshape(folded)
        q = ((_exact(q) if in_fp32 else q) * scale).reshape(folded)
        share = scores_of.softmax(q, exact_keys[:, seen], shared, start - first)
        q = q.to(query.dtype)
        grad_value[:, seen] += share.transpose(1, 2) @ g
        grad_scores = scores_of.gradient(share, g, values[:, seen])
        grad_key[:, seen] += grad_scores.transpose(1, 2) @ q  # q has the scale in it
        # (groups, n * count, d) back to (B, H, count, d).
        grad_query[:, :, start:end] = (
            (grad_scores @ keys[:, seen]).mul_(scale).view(batch, -1, count, width)
        )
    return grad_query, grad_key.view_as(key), grad_value.view_as(value)


class _Scores:
    """S, P, dP and dS of a block in backward, in the same memory for all blocks, as in forward."""

    def __init__(
        self, query: Tensor, held: int, in_fp32: bool, window: int | None, softcap: float | None
    ) -> None:
        self._window, self._softcap = window, softcap
        self._share, self._grad = query.new_empty(2, held)
        dtype = torch.float32 if in_fp32 else query.dtype
        alike = dtype is query.dtype
        self._raw = self._share if alike else torch.empty_like(self._share, dtype=dtype)
        self._slope = None if softcap is None else torch.empty_like(self._raw)

    def softmax(self, q: Tensor, keys: Tensor, shared: int, offset: int) -> Tensor:
        """P (groups, n * count, seen) of `q` (groups, n * count, d), `keys` (groups, seen, d)."""
        shape = (*q.shape[:2], keys.shape[1])
        scores, share = (x[: math.prod(shape)].view(shape) for x in (self._raw, self._share))
        if scores.dtype is torch.float32:
            bmm_to_fp32(q, keys.transpose(1, 2), scores)
        else:
            torch.bmm(q, keys.transpose(1, 2), out=scores)
        if self._slope is not None and self._softcap is not None:
            slope = self._slope[: math.prod(shape)].view(shape)
            scores.div_(self._softcap).tanh_()
            torch.mul(scores, scores, out=slope).neg_().add_(1)
            scores.mul_(self._softcap)
        hide(scores.view(shape[0], shared, -1, shape[2]), offset, self._window)
        torch.softmax(scores, -1, out=scores)
        if self._raw is not self._share:
            share.copy_(scores)
        return share

    def gradient(self, share: Tensor, grad: Tensor, values: Tensor) -> Tensor:
        """dS like `share`, in the place of dP; `grad` (groups, n * count, d)."""
        result = self._grad[: share.numel()].view(share.shape)
        torch.bmm(grad, values.transpose(1, 2), out=result)
        result = torch._softmax_backward_data(result, share, -1, share.dtype, grad_input=result)
        if self._slope is not None:
            result.mul_(self._slope[: share.numel()].view(share.shape))
        return result


def _forward_sizes(
    query: Tensor, key: Tensor, batch: int, length: int, window: int | None
) -> tuple[int, int, int, int]:
    """Of a block in forward: its sequences, key heads, queries, and the most keys it sees."""
    heads, (queries, scores) = key.shape[1], block_limits(query, backward=False)
    shared = query.shape[1] // heads
    seen = _seen(queries, length, window)
    step = max(1, min(length, queries, scores // (shared * seen)))
    parts = max(1, scores // (shared * step * seen))  # keys of one head of one sequence
    return min(batch, max(1, parts // heads)), min(heads, parts), step, seen


def _seen(queries: int, length: int, window: int | None) -> int:
    """The most keys that a block of `queries` sees."""
    return length if window is None else min(length, queries + window - 1)


def _first_key(start: int, window: int | None) -> int:
    """The first key that a block sees whose first query is `start`."""
    return 0 if window is None else max(0, start - window + 1)


def _exact(x: Tensor) -> Tensor:
    """`x` as scores are computed from it: in fp32, or as it is where 16 bits are multiplied so."""
    return x if device_type(x) == "cuda" else x.float()


def hide(scores: Tensor, offset: int, window: int | None) -> None:
    """Scores (..., count, seen): what is later than a query, or before its window, becomes -inf.

    The first query's own key is the one at `offset`.
    """
    count, seen = scores.shape[-2:]
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device)
    scores[..., seen - count :].add_(later.triu_(1))
    if window is not None and (before := count + offset - window) > 0:
        # Query r sees keys from r + offset - window + 1 on.
        early = torch.full((count, before), -torch.inf, dtype=scores.dtype, device=scores.device)
        scores[..., :before].add_(early.tril_(offset - window))


def like_heads(x: Tensor) -> Tensor:
    """An empty (B, heads, T, d) that lies in memory as (B, T, heads, d), as projections do."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)

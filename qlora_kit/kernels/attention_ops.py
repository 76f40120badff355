"""Attention by torch's fused CUDA kernels as two operations, forward and backward.

One operation each, whatever the rows are: a level of recompute can keep the result, and a plan has
its shapes. On the CPU they run as plain matmuls in fp32 or double precision, row by row, which is
what the laws of attention are tried on without a card. A kernel takes (rows, length, heads, d), so
that rows of one length that follow one another are one call, a run. The flash kernel also takes
rows of any lengths at once, (B * T, heads, d).

Sources: the schemas of `aten::_flash_attention_forward` and `aten::_efficient_attention_forward`,
the same in torch 2.6 to 2.13 in what is used here, and how torch/nn/attention/varlen.py calls the
first; Dao et al., FlashAttention (arXiv 2205.14135), for the formulas of the plain one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.device.target import has_values
from qlora_kit.kernels.attention_blocks import hide, like_heads

ALIGNMENT = 32
"""The memory-efficient kernel has statistics of a multiple of so many queries."""


@dataclass(frozen=True)
class Run:
    """Rows of one length that follow one another: `count` rows, from position `start` on.

    `padded` is what `start` would be if every row were as long as its statistics.
    """

    count: int
    length: int
    start: int
    padded: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of (B, heads, T, d) as the kernels take it: (count, length, heads, d)."""
        flat = flat_positions(x)[self.start : self.start + self.count * self.length]
        return flat.view(self.count, self.length, *flat.shape[1:])

    def sums(self, sums: Tensor, lengths: list[int], heads: int, kernel: str) -> Tensor:
        """Its part of the statistics, (count, heads, length), the length padded by `efficient`."""
        if kernel == "efficient":
            width = padded(self.length)
            part = sums[heads * self.padded : heads * (self.padded + self.count * width)]
            return part.view(self.count, heads, width)
        if self.count == len(lengths):
            return sums.view(self.count, heads, self.length)
        part = sums.view(heads, -1)[:, self.start : self.start + self.count * self.length]
        return part.view(heads, self.count, self.length).transpose(0, 1)


def runs(lengths: list[int]) -> Iterator[Run]:
    """Rows of `lengths`, one after the other, as runs of one length."""
    start = before = 0
    for length, rows in itertools.groupby(lengths):
        run = Run(len(list(rows)), length, start, before)
        yield run
        start, before = start + run.count * length, before + run.count * padded(length)


def padded(length: int) -> int:
    """The statistics that the memory-efficient kernel has of a row of `length`."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def empty_sums(query: Tensor, lengths: list[int], kernel: str) -> Tensor:
    """Room for the logarithms of the softmax's sums, flat, in fp32 or double precision.

    In a plan the rows of one sequence stand for those of all.
    """
    each = [padded(n) if kernel == "efficient" else n for n in lengths]
    batch, heads, length, _ = query.shape
    count = heads * sum(each) * (batch * length // sum(lengths))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(count, dtype=dtype)


def sums_of_heads(
    sums: Tensor, query: Tensor, lengths: list[int], kernel: str, heads: slice
) -> Tensor:
    """The statistics of some query heads alone, as a kernel takes them where it has no others."""
    count = query.shape[1]
    if len(range(*heads.indices(count))) == count:
        return sums
    if kernel == "efficient":
        if not has_values(sums):
            return sums[: sums.numel() // count * len(range(*heads.indices(count)))].clone()
        parts = (run.sums(sums, lengths, count, kernel)[:, heads] for run in runs(lengths))
        return torch.cat([part.reshape(-1) for part in parts])
    if min(lengths) < max(lengths) and sums.numel() == query.shape[:3].numel():
        return sums.view(count, -1)[heads].reshape(-1)
    # (rows, heads, longest); older torch has them so for rows of any lengths.
    return sums.view(-1, count, max(lengths))[:, heads].reshape(-1)


def flat_positions(x: Tensor) -> Tensor:
    """(B, heads, T, d) to (B * T, heads, d), which is how projections lie in memory."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def by_heads(x: Tensor, like: Tensor) -> Tensor:
    """(..., heads, d) of the kernels back to the shape of `like`, (B, heads, T, d)."""
    batch, heads, length, width = like.shape
    return x.reshape(batch, length, heads, width).transpose(1, 2)


def sequences(
    tensors: list[Tensor], starts: Tensor, lengths: list[int]
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Tensors (B, heads, T, d) as the flash kernel takes them, and its arguments of their rows.

    Rows of one length are its batch. Otherwise `starts` (N + 1,) tells them apart. The arguments
    are `cu_seqlens` and the longest row, of queries and of keys.
    """
    longest, flat = max(lengths), [flat_positions(x) for x in tensors]
    if min(lengths) < longest:
        return flat, (starts, starts, longest, longest)
    batch = [x.view(len(lengths), longest, *x.shape[1:]) for x in flat]
    return batch, (None, None, longest, longest)


CAUSAL = 1
"""The efficient kernel's `custom_mask_type` of a triangle from the top left."""


@torch.library.custom_op("qlora_kit::attend_by_kernel", mutates_args=(), device_types="cpu")
def attend_by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    kernel: str,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, d), and the logarithms of the sums as `kernel` lays them out, flat.

    Queries (B, H, T, d), keys and values for as many heads or, with `flash`, for groups of them.
    `lengths` are those of the rows, and `starts` (N + 1,) is where they begin and where the last
    one ends, read where their lengths differ. A query sees `window` keys at most, its own included.
    """
    output, sums = like_heads(query), empty_sums(query, lengths, kernel)
    for run in runs(lengths):
        q, k, v = (_plain(run, x, query) for x in (query, key, value))
        scores = _scores(q, k, scale, window)
        total = scores.logsumexp(-1)
        run.sums(sums, lengths, q.shape[1], kernel)[..., : run.length].copy_(total)
        attended = (scores - total[..., None]).exp() @ v
        run.of(output).copy_(attended.transpose(1, 2))
    return output, sums


@attend_by_kernel.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *options: Any) -> Any:
    lengths, _, kernel, _ = options
    return like_heads(query), empty_sums(query, lengths, kernel)


@attend_by_kernel.register_kernel("cuda")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    kernel: str,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if kernel == "flash":
        parts, borders = sequences([query, key, value], starts, lengths)
        output, sums, *_ = torch.ops.aten._flash_attention_forward(
            *parts, *borders, 0.0, window is None, False, scale=scale, **_window(window)
        )
        return by_heads(output, query), sums.reshape(-1)
    result, kept = like_heads(query), empty_sums(query, lengths, kernel)
    for run in runs(lengths):
        q, k, v = (run.of(x) for x in (query, key, value))
        no_bias_no_lengths = (None,) * 5
        output, sums, *_ = torch.ops.aten._efficient_attention_forward(
            *(q, k, v, *no_bias_no_lengths, 0.0, CAUSAL, True), scale=scale, window_size=window
        )
        run.of(result).copy_(output)
        run.sums(kept, lengths, query.shape[1], kernel).copy_(sums)
    return result, kept


@torch.library.custom_op(
    "qlora_kit::attend_by_kernel_backward", mutates_args=(), device_types="cpu"
)
def attend_by_kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    kernel: str,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value, shaped like these, from what forward gave."""
    results = like_heads(query), like_heads(key), like_heads(value)
    for run in runs(lengths):
        q, k, v, g, out = (_plain(run, x, query) for x in (query, key, value, grad, output))
        total = run.sums(sums, lengths, q.shape[1], kernel)[..., : run.length, None]
        share = (_scores(q, k, scale, window) - total).exp()
        by_scores = share * (g @ v.transpose(2, 3) - (g * out).sum(-1, keepdim=True)) * scale
        found = by_scores @ k, by_scores.transpose(2, 3) @ q, share.transpose(2, 3) @ g
        for result, gradient in zip(results, found, strict=True):
            count, _, length, width = gradient.shape
            by_group = gradient.view(count, result.shape[1], -1, length, width).sum(2)
            run.of(result).copy_(by_group.transpose(1, 2))
    return results


@attend_by_kernel_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    return like_heads(query), like_heads(key), like_heads(value)


@attend_by_kernel_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    kernel: str,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[1]
    if kernel == "flash":
        tensors, borders = sequences([grad, query, key, value, output], starts, lengths)
        # Flat rows have (H, B * T); those of a batch, and in older torch all, (N, H, longest).
        flat = borders[0] is not None and sums.numel() == query.shape[:3].numel()
        total = sums.view(heads, -1) if flat else sums.view(len(lengths), heads, -1)
        # Of dropout, which there is none of; read by no kernel then.
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
        by_query, by_key, by_value = torch.ops.aten._flash_attention_backward(
            *(*tensors, total, *borders, 0.0, window is None, *state),
            scale=scale,
            **_window(window),
        )
        return by_heads(by_query, query), by_heads(by_key, key), by_heads(by_value, value)
    results = like_heads(query), like_heads(key), like_heads(value)
    seed = torch.zeros((), dtype=torch.int64)  # of dropout, as above
    for run in runs(lengths):
        g, q, k, v, out = (run.of(x) for x in (grad, query, key, value, output))
        total = run.sums(sums, lengths, heads, kernel)
        no_bias, borders = None, (None, None, run.length, run.length)
        *found, _ = torch.ops.aten._efficient_attention_backward(
            *(g, q, k, v, no_bias, out, *borders, total, 0.0, seed, seed, CAUSAL, False),
            scale=scale,
            window_size=window,
        )
        for result, gradient in zip(results, found, strict=True):
            run.of(result).copy_(gradient)
    return results


ATTEND_BY_KERNEL = torch.ops.qlora_kit.attend_by_kernel.default


def _window(window: int | None) -> dict[str, int]:
    """The flash kernel's window: so many keys before a query's own, and none after it."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _plain(run: Run, x: Tensor, query: Tensor) -> Tensor:
    """A run's part of (B, heads, T, d) for plain matmuls: (count, H, length, d)."""
    part = run.of(x).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    return part.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """(count, H, length, length), with -inf where a query sees nothing."""
    scores = q @ k.transpose(2, 3) * scale
    hide(scores, 0, window)
    return scores

"""The rows of a batch as attention's kernels take them: layouts of tensors and of statistics.

A kernel takes (rows, length, heads, d), so that rows of one length that follow one another are one
call, a run. The flash kernel also takes rows of any lengths at once, (B * T, heads, d).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.device.target import has_values

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

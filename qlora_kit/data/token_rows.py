"""Encoded rows as columns, on disk or in memory; an index reads one of them.

`tokens` (int32) has one row after the other, a token that is not trained on as its complement ~id;
`lengths` (int32) the tokens of each row; `digests` 64 bits of a hash of each row, for duplicates.

Memory stays flat: writing keeps one buffer, the files are mapped, and pages of the map are given
back while reading.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qlora_kit.data.tokens import IGNORE, Encoded

COLUMNS = ("tokens", "lengths", "digests")
CHUNK = 1024**2

STRIDE = 512
"""Rows between two whose places in the file are kept in memory."""

RELEASE_ROWS = 256
"""The map's pages are given back after so many rows, of which each touches 64 KiB or its length."""


class TokenRows(Sequence[Encoded]):
    """Encoded rows that stay on disk; an index reads one of them."""

    def __init__(
        self, lengths: np.ndarray, tokens: mmap.mmap | bytearray, digests: Path | bytearray
    ) -> None:
        self.lengths = lengths
        """tokens of each row"""
        self._tokens, self._digests = tokens, digests
        self._temporary: Any = None
        sums = np.add.reduceat(self.lengths, range(0, len(self.lengths), STRIDE), dtype=np.int64)
        # Where every STRIDE-th row begins; an index of every row would be much for many rows.
        self._starts = np.concatenate([[0], np.cumsum(sums)])
        self._read = 0

    @staticmethod
    def on_disk(directory: Path, temporary: Any = None) -> TokenRows:
        """The rows of a directory, mapped; `temporary` goes when nothing holds the rows."""
        tokens: mmap.mmap | bytearray = bytearray()
        with open(directory / "tokens", "rb") as file:
            if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                tokens = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = TokenRows(
            np.fromfile(directory / "lengths", np.int32), tokens, directory / "digests"
        )
        rows._temporary = temporary
        return rows

    @staticmethod
    def in_memory(columns: Mapping[str, bytearray]) -> TokenRows:
        """The rows of columns that are not on disk."""
        lengths = np.frombuffer(columns["lengths"], np.int32)
        return TokenRows(lengths, columns["tokens"], columns["digests"])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        block, place = divmod(index % len(self), STRIDE)
        before = self.lengths[block * STRIDE : block * STRIDE + place].sum(dtype=np.int64)
        start, length = int(self._starts[block] + before), int(self.lengths[index])
        raw = np.frombuffer(self._tokens, np.int32, length, 4 * start)
        ids = np.where(raw < 0, ~raw, raw).tolist()
        labels = np.where(raw < 0, IGNORE, raw).tolist()
        del raw
        self._read += 1
        if self._read % RELEASE_ROWS == 0 and hasattr(self._tokens, "madvise"):
            self._tokens.madvise(mmap.MADV_DONTNEED)
        return Encoded(ids, labels)

    @property
    def digests(self) -> np.ndarray:
        """A 64-bit hash of each row's tokens and labels."""
        if isinstance(self._digests, bytearray):
            return np.frombuffer(self._digests, np.uint64)
        return np.fromfile(self._digests, np.uint64)


def writer(columns: Mapping[str, Callable[[bytes], object]]) -> Callable[[list[int]], None]:
    """What appends one row, its untrained tokens complemented, to the columns."""
    tokens, lengths, digests = (columns[name] for name in COLUMNS)

    def add(stored: list[int]) -> None:
        raw = array("i", stored).tobytes()
        tokens(raw)
        lengths(array("i", [len(stored)]).tobytes())
        digests(hashlib.blake2b(raw, digest_size=8).digest())

    return add


def pair_digests(digests: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each two neighbours of `digests`."""
    chosen, rejected = digests.reshape(-1, 2).T
    joined: np.ndarray = chosen * np.uint64(0x9E3779B97F4A7C15) + rejected  # order matters
    return joined


def duplicates(digests: np.ndarray) -> int:
    """How many rows are equal to an earlier one."""
    ordered = np.sort(digests)
    return int((ordered[1:] == ordered[:-1]).sum())

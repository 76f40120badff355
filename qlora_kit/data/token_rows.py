"""Encoded rows as columns, on disk or in memory; an index reads one of them.

`tokens` (int32) has one row after the other, a token that is not trained on as its complement ~id;
`lengths` (int32) the tokens of each row; `digests` 64 bits of a hash of each row, for duplicates.

An entry of the token cache counts where it is this user's alone, every file is as it was written,
and the tokens are what the key says: ids that the tokenizer has, rows of the lengths that were
asked for, as many as were counted.

Memory stays flat: writing keeps one buffer, the files are mapped, and pages of the map are given
back while reading.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from qlora_kit.data.tokens import IGNORE, Encoded
from qlora_kit.files.opened import is_own, open_own

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


FACTS, FACTS_LIMIT = "facts.json", 16 * 1024**2

SHAPES: dict[str, Any] = {
    **dict.fromkeys(("source_rows", "rows", "tokens", "supervised_tokens", "unknown_tokens"), 0),
    "pairs": 0,
    **dict.fromkeys(("controls", "doubled", "truncated", "cut_tokens", "duplicates"), 0),
    "skipped": {"": 0},
    "unused": {"": 0},
    "cut": {"": (0, 0)},
    "lost": [("", "")],
    "shortened": [("", 0)],
    "checksums": {"": 0},
    "key": "",
}
"""What facts.json holds; no number is negative."""


@dataclass(frozen=True)
class Entry:
    """What is looked for: a key, and what its tokens must be."""

    key: str
    max_length: int
    id_limit: Callable[[], int]
    """above every id that the tokenizer has; asked where there is something to check"""


def facts_sum(facts: dict[str, Any]) -> int:
    """A checksum of facts, whatever the order of their names."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def checksum(file: Any, look: Callable[[bytes], object] = len) -> int:
    """Of all that a file holds, which is closed; `look` is shown every part."""
    value = 0
    with file:
        while chunk := file.read(CHUNK):
            look(chunk)
            value = zlib.crc32(chunk, value)
    return value


def verified(entry: Path, wanted: Entry) -> dict[str, Any] | None:
    """The facts of an entry that is ours, as it was written, and what is looked for."""
    try:
        return _facts(entry, wanted)
    except (OSError, ValueError, RecursionError):
        return None


def _facts(entry: Path, wanted: Entry) -> dict[str, Any]:
    """Errors: `OSError` and `ValueError` for whatever is not as it should be."""
    status = os.lstat(entry)
    _expect(stat.S_ISDIR(status.st_mode) and is_own(status))
    with open_own(entry / FACTS) as file:
        facts = json.loads(file.read(FACTS_LIMIT))
    _expect(isinstance(facts, dict))
    said = facts.pop("sum", None)
    _expect(facts.keys() == SHAPES.keys() and _fits(facts, SHAPES))
    _expect(said == facts_sum(facts) and facts["key"] == wanted.key)
    _expect(facts["checksums"].keys() == set(COLUMNS))
    _expect(bool(facts["lost"]) == bool(sum(facts["skipped"].values())))
    limit, sums = wanted.id_limit(), {"rows": 0, "tokens": 0, "supervised": 0}

    def tokens(chunk: bytes) -> None:
        raw = np.frombuffer(chunk, np.int32)
        _expect(int(np.where(raw < 0, ~raw, raw).max()) < limit)
        sums["supervised"] += int((raw >= 0).sum())

    def lengths(chunk: bytes) -> None:
        found = np.frombuffer(chunk, np.int32)
        _expect(int(found.min()) >= 2 and int(found.max()) <= wanted.max_length)
        sums["rows"] += len(found)
        sums["tokens"] += int(found.sum(dtype=np.int64))

    for name, look in (("lengths", lengths), ("tokens", tokens), ("digests", len)):
        file = open_own(entry / name)
        size = os.fstat(file.fileno()).st_size
        _expect(checksum(file, look) == facts["checksums"][name])
        width = {"lengths": 4 * facts["rows"], "tokens": 4 * facts["tokens"]}
        _expect(size == width.get(name, 8 * facts["rows"]))
    _expect(sums["rows"] == facts["rows"] and sums["tokens"] == facts["tokens"])
    _expect(facts["pairs"] in (0, facts["rows"] / 2))
    _expect(facts["rows"] <= sums["supervised"] == facts["supervised_tokens"])
    return dict(facts)


def _expect(holds: bool) -> None:
    if not holds:
        raise ValueError


def _fits(value: Any, shape: Any) -> bool:
    """Whether JSON is of a shape: a tuple stands for as many values, a list for any number."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            _fits(one, shape.get(name, shape.get(""))) for name, one in value.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    if isinstance(shape, tuple):
        return (
            isinstance(value, list) and len(value) == len(shape) and all(map(_fits, value, shape))
        )
    return type(value) is type(shape) and (shape == "" or value >= 0)

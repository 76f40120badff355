"""Encoded rows on disk, mapped into memory, and found again under a key of all they depend on.

A directory holds `tokens` (int32, one row after the other; a token that is not trained on is
stored as its complement ~id), `lengths` (int32), `digests` (64 bits of a hash of each row, for
duplicates) and `facts.json`, written last, with a checksum of each file. The key covers the rows'
content, the tokenizer, its template, the settings and this code. A directory that is incomplete
or damaged is made again. Without a cache directory the same files live as long as the rows.

Memory stays flat: writing keeps one buffer, and pages of the map are given back while reading.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from qlora_kit.data.outcome import EncodeRules, Outcome, Tally
from qlora_kit.data.read import Row, Table
from qlora_kit.data.tokens import IGNORE, Encoded
from qlora_kit.publish import new_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokens", "lengths", "digests")
CHUNK = 1024**2
CACHE_BYTES = 20 * 1024**3
"""Older entries of the default cache are removed beyond this."""

STRIDE = 512
"""Rows between two whose places in the file are kept in memory."""

RELEASE_ROWS = 256
"""The map's pages are given back after so many rows, of which each touches 64 KiB or its length."""


@dataclass(frozen=True)
class Stored:
    """Rows on disk, and what was counted while they were made."""

    rows: TokenRows
    facts: dict[str, Any]


class TokenRows(Sequence[Encoded]):
    """Encoded rows that stay on disk; an index reads one of them."""

    def __init__(self, directory: Path, temporary: Any = None) -> None:
        # What holds the directory goes when nothing holds the rows any more.
        self._temporary = temporary
        self.lengths: np.ndarray = np.fromfile(directory / "lengths", np.int32)
        """tokens of each row"""
        self._digests = directory / "digests"
        sums = np.add.reduceat(self.lengths, range(0, len(self.lengths), STRIDE), dtype=np.int64)
        # Where every STRIDE-th row begins; an index of every row would be much for many rows.
        self._starts = np.concatenate([[0], np.cumsum(sums)])
        self._read = 0
        with open(directory / "tokens", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None

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
        assert self._map is not None
        block, place = divmod(index % len(self), STRIDE)
        before = self.lengths[block * STRIDE : block * STRIDE + place].sum(dtype=np.int64)
        start, length = int(self._starts[block] + before), int(self.lengths[index])
        raw = np.frombuffer(self._map, np.int32, length, 4 * start)
        ids = np.where(raw < 0, ~raw, raw).tolist()
        labels = np.where(raw < 0, IGNORE, raw).tolist()
        del raw
        self._read += 1
        if self._read % RELEASE_ROWS == 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return Encoded(ids, labels)

    @property
    def digests(self) -> np.ndarray:
        """A 64-bit hash of each row's tokens and labels."""
        return np.fromfile(self._digests, np.uint64)


def cached(
    cache: Path | None,
    key: str | None,
    make: Callable[[], Iterable[Outcome]],
    unknown_id: int | None = None,
) -> Stored:
    """The rows stored under a key, or those that `make` gives, which are then stored there.

    `unknown_id` is the token for what the tokenizer does not know; it is counted.
    """
    if cache is None or key is None:
        temporary = tempfile.TemporaryDirectory(prefix="qlora-kit-tokens-")
        directory = Path(temporary.name)
        facts = _write(directory, make(), unknown_id)
        return Stored(TokenRows(directory, temporary), facts)
    entry = cache / key
    found = _verified(entry)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            # A home that cannot be written to is no reason not to train.
            return cached(None, None, make, unknown_id)
        with new_directory(entry) as aside:
            found = _write(aside, make(), unknown_id)
        _prune(cache, keep=entry)
    os.utime(entry)
    return Stored(TokenRows(entry), found)


def cache_directory(named: str | None) -> Path | None:
    """The directory that `--token_cache` means; `none` means none."""
    if named is None:
        return default_cache()
    return None if named == "none" else Path(named).expanduser()


def default_cache() -> Path:
    """Where tokens are kept unless another place is named."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "qlora_kit" / "tokens"


def encoding_key(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rules: EncodeRules,
) -> str | None:
    """A hash of all that encoded rows depend on; None for rows that come from no file."""
    if not isinstance(rows, Table):
        return None
    parts = [
        _code(),
        rows.fingerprint,
        _tokenizer_text(tokenizer),
        str(tokenizer.chat_template),
        f"{max_length} {rules}",
    ]
    digests = [hashlib.blake2b(part.encode(), digest_size=32).hexdigest() for part in parts]
    return hashlib.blake2b(json.dumps(digests).encode(), digest_size=20).hexdigest()


@functools.cache
def _code() -> str:
    """A hash of this folder's code: what was encoded by another version is not found."""
    digest = hashlib.blake2b()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_text(tokenizer: Any) -> str:
    special = json.dumps([tokenizer.special_tokens_map, type(tokenizer).__name__], default=str)
    if tokenizer.is_fast:
        return special + str(tokenizer.backend_tokenizer.to_str())
    return special + json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _write(directory: Path, outcomes: Iterable[Outcome], unknown_id: int | None) -> dict[str, Any]:
    """Store the rows of `outcomes`; returns the facts about them."""
    tally = Tally(unknown_id)
    with _columns(directory) as add:
        for outcome in outcomes:
            for stored in tally.stored(outcome):
                add(stored)
    facts = {
        **tally.facts(),
        "duplicates": _duplicates(directory / "digests"),
        "checksums": {name: _checksum(directory / name) for name in FILES},
    }
    (directory / "facts.json").write_text(json.dumps(facts))
    return facts


@contextlib.contextmanager
def _columns(directory: Path) -> Iterator[Callable[[list[int]], None]]:
    """What appends one row, its untrained tokens complemented, to the files of a directory."""
    with (
        open(directory / "tokens", "wb", buffering=CHUNK) as tokens,
        open(directory / "lengths", "wb", buffering=CHUNK) as lengths,
        open(directory / "digests", "wb", buffering=CHUNK) as digests,
    ):

        def add(stored: list[int]) -> None:
            raw = array("i", stored).tobytes()
            tokens.write(raw)
            lengths.write(array("i", [len(stored)]).tobytes())
            digests.write(hashlib.blake2b(raw, digest_size=8).digest())

        yield add


def _duplicates(path: Path) -> int:
    digests = np.fromfile(path, np.uint64)
    digests.sort()
    return int((digests[1:] == digests[:-1]).sum())


def _checksum(path: Path) -> int:
    value = 0
    for chunk in _chunks(path):
        value = zlib.crc32(chunk, value)
    return value


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _verified(entry: Path) -> dict[str, Any] | None:
    """The facts of an entry whose files are as they were written."""
    try:
        facts: dict[str, Any] = json.loads((entry / "facts.json").read_text())
        good = all(_checksum(entry / name) == facts["checksums"][name] for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if good else None


def _prune(cache: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest, down to `CACHE_BYTES`."""
    entries = [path for path in cache.iterdir() if (path / "facts.json").exists()]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > CACHE_BYTES and entry != keep:
            shutil.rmtree(entry, ignore_errors=True)

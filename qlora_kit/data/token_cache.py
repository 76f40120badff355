"""Encoded rows on disk, found again under a key of all they depend on.

An entry is a directory of `token_rows.py`'s columns and of `facts.json`, written last. The key
covers the rows' content, the tokenizer, its template, the settings and this code. An entry counts
where it is this user's alone, every file is as it was written, and the tokens are what the key
says: ids that the tokenizer has, rows of the lengths that were asked for, as many as were counted.
Any other is made again.

Keeping tokens is a convenience. Where the directory cannot be used they go to a temporary folder,
which goes with the rows, and where there is none either they stay in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_kit.data.outcome import EncodeRules, Outcome, Tally
from qlora_kit.data.rows import Row, Table
from qlora_kit.data.token_rows import CHUNK, COLUMNS, TokenRows, duplicates, writer
from qlora_kit.files.aside import new_directory
from qlora_kit.files.publish import mend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_BYTES = 20 * 1024**3
"""Older entries of the default cache are removed beyond this."""
FACTS, FACTS_LIMIT = "facts.json", 16 * 1024**2

SHAPES: dict[str, Any] = {
    **dict.fromkeys(("source_rows", "rows", "tokens", "supervised_tokens", "unknown_tokens"), 0),
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
class Stored:
    """Encoded rows, and what was counted while they were made."""

    rows: TokenRows
    facts: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What is looked for: a key, and what its tokens must be."""

    key: str
    max_length: int
    id_limit: Callable[[], int]
    """above every id that the tokenizer has; asked where there is something to check"""


class _RowsError(Exception):
    """The rows could not be read: that is no fault of where they are kept."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def cached(
    cache: Path | None,
    wanted: Entry | None,
    make: Callable[[], Iterable[Outcome]],
    unknown_id: int | None = None,
) -> Stored:
    """The rows kept under a key, or those that `make` gives, which are then kept there.

    `unknown_id` is the token for what the tokenizer does not know; it is counted.
    """
    try:
        if cache is not None and wanted is not None:
            try:
                return _kept(cache, wanted, make, unknown_id)
            except OSError as error:
                _note(f"the tokens are not kept in {cache}: {error.strerror or error}")
        try:
            temporary = tempfile.TemporaryDirectory(prefix="qlora-kit-tokens-")
            facts = _write(Path(temporary.name), make(), unknown_id)
            return Stored(TokenRows.on_disk(Path(temporary.name), temporary), facts)
        except OSError as error:
            _note(f"the tokens stay in memory: no temporary folder: {error.strerror or error}")
        tally = Tally(unknown_id)
        columns = {name: bytearray() for name in COLUMNS}
        add = writer({name: column.extend for name, column in columns.items()})
        for outcome in _rows(make()):
            for stored in tally.stored(outcome):
                add(stored)
        rows = TokenRows.in_memory(columns)
        return Stored(rows, {**tally.facts(), "duplicates": duplicates(rows.digests)})
    except _RowsError as failed:
        raise failed.error from None


def _kept(
    cache: Path, wanted: Entry, make: Callable[[], Iterable[Outcome]], unknown_id: int | None
) -> Stored:
    entry = cache / wanted.key
    found = _verified(entry, wanted)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        if entry.is_symlink():
            entry.unlink()
        with new_directory(entry) as aside:
            found = _write(aside, make(), unknown_id, wanted.key)
        # Whatever the umask: what others may write to is not used again, nor is it theirs to read.
        os.chmod(entry, 0o700)
        _prune(cache, keep=entry)
    with contextlib.suppress(OSError):
        os.utime(entry)
    return Stored(TokenRows.on_disk(entry), found)


def _note(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def cache_directory(named: str | None) -> Path | None:
    """The directory that `--token_cache` means; `none` means none."""
    if named is None:
        return default_cache()
    return None if named == "none" else Path(os.path.expanduser(named))


def default_cache() -> Path | None:
    """Where tokens are kept unless another place is named; None for a user without a home."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    # The standard of XDG has a relative one ignored; `~` stays where nobody's home is known.
    return Path(home) / "qlora_kit" / "tokens" if os.path.isabs(home) else None


def id_limit(tokenizer: Any) -> int:
    """A number above every id of a tokenizer's tokens; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


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


def _rows(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes, an `OSError` of their source told from one of writing."""
    try:
        yield from outcomes
    except OSError as error:
        raise _RowsError(error) from error


def _write(
    directory: Path, outcomes: Iterable[Outcome], unknown_id: int | None, key: str = ""
) -> dict[str, Any]:
    """Store the rows of `outcomes`; returns the facts about them."""
    tally = Tally(unknown_id)
    with contextlib.ExitStack() as files:
        opened = {
            name: files.enter_context(_private(directory / name, buffering=CHUNK))
            for name in COLUMNS
        }
        add = writer({name: file.write for name, file in opened.items()})
        for outcome in _rows(outcomes):
            for stored in tally.stored(outcome):
                add(stored)
    facts = {
        **tally.facts(),
        "duplicates": duplicates(np.fromfile(directory / "digests", np.uint64)),
        "checksums": {name: _checksum((directory / name).open("rb")) for name in COLUMNS},
        "key": key,
    }
    with _private(directory / FACTS) as file:
        file.write(json.dumps({**facts, "sum": _sum(facts)}).encode())
    return facts


def _private(path: Path, buffering: int = -1) -> Any:
    """A new file that its user alone may read and write."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    return open(path, "wb", buffering=buffering, opener=opened)


def _sum(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _checksum(file: Any, look: Callable[[bytes], object] = len) -> int:
    """Of all that a file holds, which is closed; `look` is shown every part."""
    value = 0
    with file:
        while chunk := file.read(CHUNK):
            look(chunk)
            value = zlib.crc32(chunk, value)
    return value


def _verified(entry: Path, wanted: Entry) -> dict[str, Any] | None:
    """The facts of an entry that is ours, as it was written, and what is looked for."""
    try:
        return _facts(entry, wanted)
    except (OSError, ValueError, RecursionError):
        return None


def _facts(entry: Path, wanted: Entry) -> dict[str, Any]:
    """Errors: `OSError` and `ValueError` for whatever is not as it should be."""
    status = os.lstat(entry)
    _expect(stat.S_ISDIR(status.st_mode) and _is_own(status))
    with _own(entry / FACTS) as file:
        facts = json.loads(file.read(FACTS_LIMIT))
    _expect(isinstance(facts, dict))
    said = facts.pop("sum", None)
    _expect(facts.keys() == SHAPES.keys() and _fits(facts, SHAPES))
    _expect(said == _sum(facts) and facts["key"] == wanted.key)
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
        file = _own(entry / name)
        size = os.fstat(file.fileno()).st_size
        _expect(_checksum(file, look) == facts["checksums"][name])
        width = {"lengths": 4 * facts["rows"], "tokens": 4 * facts["tokens"]}
        _expect(size == width.get(name, 8 * facts["rows"]))
    _expect(sums["rows"] == facts["rows"] and sums["tokens"] == facts["tokens"])
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


def _is_own(status: os.stat_result) -> bool:
    """Whether nobody else could have written a file or a directory."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _own(path: Path) -> Any:
    """A file of ours, open. Errors: `OSError`; `ValueError` for another's, a link or a pipe."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or not _is_own(status):
        os.close(handle)
        raise ValueError
    return open(handle, "rb")


def _prune(cache: Path, keep: Path) -> None:
    """Remove what killed processes left, and the entries that were not used for longest."""
    with contextlib.suppress(OSError):
        for name in os.listdir(cache):
            if left := re.fullmatch(r"\.([0-9a-f]{40})\.\d+\.(tmp|old)", name):
                mend(cache / left[1])
        entries = [path for path in cache.iterdir() if (path / FACTS).exists()]
        entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for entry in entries:
            total += sum(file.stat().st_size for file in entry.iterdir())
            if total > CACHE_BYTES and entry != keep:
                shutil.rmtree(entry, ignore_errors=True)

"""Encoded rows on disk, found again under a key of all they depend on.

An entry is a directory of `token_rows.py`'s columns and of `facts.json`, written last. The key
covers the rows' content, the tokenizer, its template, the settings and this code. An entry that
`token_rows.py` refuses is encoded anew.

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
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_kit.data.outcome import EncodeRules, Outcome, Tally
from qlora_kit.data.rows import Row, Table
from qlora_kit.data.token_rows import (
    CHUNK,
    COLUMNS,
    FACTS,
    Entry,
    TokenRows,
    checksum,
    duplicates,
    facts_sum,
    pair_digests,
    verified,
    writer,
)
from qlora_kit.files.aside import new_directory
from qlora_kit.files.opened import kept_in
from qlora_kit.files.publish import mend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_BYTES = 20 * 1024**3
"""Older entries of the default cache are removed beyond this."""


@dataclass(frozen=True)
class Stored:
    """Encoded rows, and what was counted while they were made."""

    rows: TokenRows
    facts: dict[str, Any]


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
        columns = {name: bytearray() for name in COLUMNS}
        add = writer({name: column.extend for name, column in columns.items()})
        facts = _counted(make(), unknown_id, add)
        rows = TokenRows.in_memory(columns)
        return Stored(rows, {**facts, "duplicates": _duplicates(rows.digests, facts)})
    except _RowsError as failed:
        raise failed.error from None


def _kept(
    cache: Path, wanted: Entry, make: Callable[[], Iterable[Outcome]], unknown_id: int | None
) -> Stored:
    entry = cache / wanted.key
    found = verified(entry, wanted)
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
        return kept_in("tokens")
    return None if named == "none" else Path(os.path.expanduser(named))


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


def _counted(
    outcomes: Iterable[Outcome], unknown_id: int | None, add: Callable[[list[int]], None]
) -> dict[str, Any]:
    """Add the rows of `outcomes`; returns what was counted of them."""
    tally = Tally(unknown_id)
    for outcome in _rows(outcomes):
        for stored in tally.stored(outcome):
            add(stored)
    return tally.facts()


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
    with contextlib.ExitStack() as files:
        opened = {
            name: files.enter_context(_private(directory / name, buffering=CHUNK))
            for name in COLUMNS
        }
        add = writer({name: file.write for name, file in opened.items()})
        facts = _counted(outcomes, unknown_id, add)
    facts |= {
        "duplicates": _duplicates(np.fromfile(directory / "digests", np.uint64), facts),
        "checksums": {name: checksum((directory / name).open("rb")) for name in COLUMNS},
        "key": key,
    }
    with _private(directory / FACTS) as file:
        file.write(json.dumps({**facts, "sum": facts_sum(facts)}).encode())
    return facts


def _duplicates(digests: np.ndarray, facts: dict[str, Any]) -> int:
    """Rows that are equal to an earlier one, or pairs."""
    return duplicates(pair_digests(digests) if facts["pairs"] else digests)


def _private(path: Path, buffering: int = -1) -> Any:
    """A new file that its user alone may read and write."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    return open(path, "wb", buffering=buffering, opener=opened)


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

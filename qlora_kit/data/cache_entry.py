"""Whether an entry of the token cache is what it says, checked before its tokens are used.

It counts where it is this user's alone, every file is as it was written, and the tokens are what
the key says: ids that the tokenizer has, rows of the lengths that were asked for, as many as were
counted.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit.data.token_rows import CHUNK, COLUMNS
from qlora_kit.files.own import is_own, open_own

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

"""A file of any type that is read to its records, one at a time: `(line, {field: value})`.

JSON lines, JSON arrays, tables (`tables.py`), plain text, and splits of the hub. Reading streams,
so memory does not grow with the file. Lines count from 1; a record of Parquet, of Arrow or of the
hub has its number for a line. Errors have `file:line`.

Plain text is one document; it comes in blocks of whole lines. Parquet, Arrow and the hub need the
extra `data` (pyarrow, datasets).

Left out: what the fields mean (`schema.py`).
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_kit.data.fields import kind
from qlora_kit.data.json_text import JsonError, elements, loads
from qlora_kit.data.lines import (
    CHUNK,
    MAX_ROW_BYTES,
    GivenRows,
    check_file,
    decoded,
    kind_of,
    lines,
    opened,
    too_long,
)
from qlora_kit.data.source import HubSplit, Part
from qlora_kit.data.tables import arrow_rows, csv_rows, extra, parquet_count, parquet_rows
from qlora_kit.errors import DataError, ResourceError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
BLOCK_CHARACTERS = 64 * 1024
"""Plain text comes in blocks of about this size, smaller in files below 20 of them."""

Record = tuple[int, dict[str, Any]]


def records(
    source: Part,
    chosen: Iterable[Any] | None = None,
    limit: int = MAX_ROW_BYTES,
) -> Iterator[Record]:
    """The records of a source in their order, or those that have a true value in `chosen`.

    Of `chosen` one value is taken for each record. A record has at most `limit` bytes.
    Errors: `DataError` with `file:line`, also where there is no record at all; `UnsafeInputError`
    for what is no plain file; `ResourceError` where a package or the network is missing.
    """
    raws, parse = _reader(source, limit)
    wanted = None if chosen is None else iter(chosen)
    empty = True
    for line, raw in raws:
        empty = False
        # JSON lines that are not wanted are not even parsed.
        if wanted is None or next(wanted):
            yield line, parse(raw, f"{source}:{line}")
    if empty:
        raise DataError(f"{source}:1: the file is empty or blank", "give at least one row")


def count(source: Part, limit: int = MAX_ROW_BYTES) -> int:
    """How many records there are."""
    if isinstance(source, Path) and kind_of(source) == ".parquet":
        return parquet_count(source)
    raws, _ = _reader(source, limit)
    return sum(1 for _ in raws)


def fingerprint(source: Part) -> str:
    """A hash of everything that a source holds."""
    if isinstance(source, HubSplit):
        return str(_hub(source)._fingerprint)
    if isinstance(source, GivenRows):
        return source.digest
    digest = hashlib.blake2b()
    with opened(source) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hub_splits(name: str, subset: str | None) -> list[str]:
    """The names of the splits of a data set on the hub."""
    datasets = extra("datasets", f"the hub id {name}")
    with _hub_errors(name):
        return list(datasets.get_dataset_split_names(name, subset))


Raws = Iterator[tuple[int, Any]]


def _reader(source: Part, limit: int) -> tuple[Raws, Callable[[Any, str], dict[str, Any]]]:
    """The unparsed records of a source, and what parses one."""
    if isinstance(source, HubSplit):
        return enumerate(_hub(source), 1), _object
    if isinstance(source, GivenRows):
        return _given(source, limit), _parse_line
    check_file(source)
    suffix = kind_of(source)
    if suffix in DELIMITERS:
        return csv_rows(source, DELIMITERS[suffix], limit), _object
    if suffix == ".parquet":
        return parquet_rows(source, limit), _object
    if suffix == ".arrow":
        return arrow_rows(source, limit), _object
    if suffix == ".txt":
        return _text(source, limit), _object
    if suffix == ".json" and _first_character(source) == "[":
        return elements(source, limit), _object
    return _json_lines(source, limit), _parse_line


def _json_lines(path: Path, limit: int) -> Raws:
    for line, offset, raw in lines(path, limit):
        if raw.strip():
            yield line, (raw, offset)


def _given(source: GivenRows, limit: int) -> Raws:
    for number, line in source.lines():
        if len(line) > limit:
            raise too_long(f"{source}:{number}: the row", limit)
        yield number, (line, 0)


def _parse_line(raw: tuple[bytes, int], where: str) -> dict[str, Any]:
    remedy = "write one complete JSON object per line"
    text = decoded(*raw, where)
    try:
        value = loads(text)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg}, column {error.pos + 1}"
        if error.msg == "Extra data":
            reason = f"more than one JSON value, the second at column {error.pos + 1}"
        elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            reason = "the line ends in the middle of its JSON"
        raise DataError(f"{where}: {reason}", remedy) from error
    except JsonError as error:
        raise DataError(f"{where}: not JSON that is read: {error}", remedy) from error
    except ValueError as error:
        raise DataError(f"{where}: a number too long: {error}", remedy) from error
    return _object(value, where, remedy)


def _object(
    value: Any, where: str, remedy: str = "write one object for each row"
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: the row is {kind(value)}, not an object", remedy)
    return value


def _first_character(path: Path) -> str:
    """The first character that is not blank; "" where there is none. An array may be one line."""
    with opened(path) as file:
        start = file.read(3).removeprefix(codecs.BOM_UTF8)
        while not start.strip():
            if not (start := file.read(CHUNK)):
                return ""
    return start.strip()[:1].decode("ascii", errors="replace")


def _text(path: Path, limit: int) -> Raws:
    """Blocks of whole lines; the last one is marked, for there the document ends."""
    size = path.stat().st_size
    block = min(BLOCK_CHARACTERS, max(1024, size // 20))
    parts: list[str] = []
    first, length, previous = 1, 0, ""
    for line, offset, raw in lines(path, limit):
        text = decoded(raw, offset, f"{path}:{line}")
        # A cut between two lines of text changes no token: tokens hold one line end with what is
        # before it, or runs of blank lines, but no tokenizer joins a line end to the next word.
        clean = previous.strip() and not text[:1].isspace()
        if length >= block and (clean or length >= 4 * block):
            yield first, {"text": "".join(parts), "goes_on": True}
            parts, first, length = [], line, 0
        parts.append(text)
        length += len(text)
        previous = text
    if "".join(parts).strip() or first > 1:
        yield first, {"text": "".join(parts)}


def _hub(source: HubSplit) -> Any:
    """The split, fetched where the hub's local cache does not hold it; its Arrow file is mapped."""
    datasets = extra("datasets", f"the hub id {source.name}")
    with _hub_errors(source.name):
        return datasets.load_dataset(source.name, source.subset, split=source.split)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """The libraries below raise exceptions of many kinds; they become two of ours."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        raise ResourceError(
            f"{name}: the hub cannot be reached, and the local cache does not hold this data set",
            "connect to the network, or give a file",
        ) from error
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}:1: the hub's data set cannot be loaded: {text}",
            "check the name (owner/name or owner/name:subset), or give a file",
        ) from error

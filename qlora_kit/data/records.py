"""A file of any type that is read to its records, one at a time: `(line, {field: value})`.

JSON lines, JSON arrays, CSV with a header, Parquet, plain text, and splits of the hub. Reading
streams, so memory does not grow with the file. Lines count from 1; a record of Parquet or of the
hub has its number for a line. Errors have `file:line`.

CSV is read by Python's own module: every value is the text that stands there, where libraries for
tables would make 007 a number and NA a missing value. Plain text is one document; it comes in
blocks of whole lines. Parquet and the hub need the extra `data` (pyarrow, datasets).

Left out: what the fields mean (`shapes.py`).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit.data.fields import kind
from qlora_kit.data.find import HubSplit, Source, check_file
from qlora_kit.data.json_array import elements
from qlora_kit.data.json_text import JsonError, loads
from qlora_kit.data.lines import CHUNK, MAX_LINE_BYTES, decoded, lines, opened
from qlora_kit.errors import DataError, ResourceError

BLOCK_CHARACTERS = 64 * 1024
"""Plain text comes in blocks of about this size, smaller in files below 20 of them."""

Record = tuple[int, dict[str, Any]]


def records(source: Source, chosen: np.ndarray | None = None) -> Iterator[Record]:
    """The records of a source in their order, or those whose number has a true value in `chosen`.

    Errors: `DataError` with `file:line`, also where there is no record at all; `UnsafeInputError`
    for what is no plain file; `ResourceError` where a package or the network is missing.
    """
    raws, parse = _reader(source)
    empty = True
    for number, (line, raw) in enumerate(raws):
        empty = False
        # JSON lines that are not wanted are not even parsed.
        if chosen is None or chosen[number]:
            yield line, parse(raw, f"{source}:{line}")
    if empty:
        raise DataError(f"{source}:1: the file is empty or blank", "give at least one row")


def count(source: Source) -> int:
    """How many records there are."""
    raws, _ = _reader(source)
    return sum(1 for _ in raws)


def fingerprint(source: Source) -> str:
    """A hash of everything that a source holds."""
    if isinstance(source, HubSplit):
        return str(_hub(source)._fingerprint)
    digest = hashlib.blake2b()
    with opened(source) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hub_splits(name: str, subset: str | None) -> list[str]:
    """The names of the splits of a data set on the hub."""
    datasets = _extra("datasets", f"the hub id {name}")
    with _hub_errors(name):
        return list(datasets.get_dataset_split_names(name, subset))


Raws = Iterator[tuple[int, Any]]


def _reader(source: Source) -> tuple[Raws, Callable[[Any, str], dict[str, Any]]]:
    """The unparsed records of a source, and what parses one."""
    if isinstance(source, HubSplit):
        return enumerate(_hub(source), 1), _object
    check_file(source)
    suffix = source.suffix.lower()
    if suffix == ".csv":
        return _csv(source), _object
    if suffix == ".parquet":
        return _parquet(source), _object
    if suffix == ".txt":
        return _text(source), _object
    if suffix == ".json" and _first_character(source) == "[":
        return elements(source), _object
    return _json_lines(source), _parse_line


def _json_lines(path: Path) -> Raws:
    for line, offset, raw in lines(path):
        if raw.strip():
            yield line, (raw, offset)


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
    """The first character that is not blank; "" where there is none."""
    for _, offset, raw in lines(path):
        if text := raw.strip():
            return decoded(text[:1], offset, f"{path}:1") if text[:1].isascii() else "?"
    return ""


def _csv(path: Path) -> Raws:
    """The records below the header; a quoted field may hold line ends."""
    csv.field_size_limit(MAX_LINE_BYTES)
    texts = (decoded(raw, offset, f"{path}:{line}") for line, offset, raw in lines(path))
    reader = csv.reader(texts, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV: {error}", "correct the quotes") from error
        if values is None:
            return
        if not values:
            continue
        if not header:
            header = values
            for name in header:
                if header.count(name) > 1:
                    raise DataError(
                        f'{path}:{line}: the column "{name}" is there twice', "rename one of them"
                    )
            continue
        if len(values) != len(header):
            raise DataError(
                f"{path}:{line}: {len(values)} values below {len(header)} columns",
                "give every row one value for each column; quote values that hold commas",
            )
        yield line, dict(zip(header, values, strict=True))


def _parquet(path: Path) -> Raws:
    parquet = _extra("pyarrow.parquet", str(path))
    arrow = importlib.import_module("pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}:{number + 1}: not Parquet that can be read: {error}", "write the file again"
        ) from error


def _text(path: Path) -> Raws:
    """Blocks of whole lines; the last one is marked, for there the document ends."""
    size = path.stat().st_size
    block = min(BLOCK_CHARACTERS, max(1024, size // 20))
    parts: list[str] = []
    first, length, previous = 1, 0, ""
    for line, offset, raw in lines(path):
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
    datasets = _extra("datasets", f"the hub id {source.name}")
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


def _extra(module: str, what: str) -> Any:
    """A package of the extra `data`, imported when it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ResourceError(
            f"{what}: reading it needs the package {package}, which is not installed",
            "install it with: pip install 'qlora-kit[data]'",
        ) from error

"""Which files are read, and their bytes as lines: plain file, length and UTF-8 are checked first.

A file whose name ends in `.gz` is unpacked as it is read.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qlora_kit.config.data import DataConfig
from qlora_kit.errors import ConfigError, DataError, UnsafeInputError, from_os_error
from qlora_kit.options.checks import size_bytes

PLAIN = (".jsonl", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*PLAIN, *(f"{suffix}.gz" for suffix in PLAIN), ".parquet", ".arrow")
READ = "a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file, or a directory with train.*"


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: `.jsonl` also of `rows.jsonl.gz`."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else Path(name).suffix


def check_file(path: Path) -> None:
    """Refuse a file that is not read, before it is opened.

    Opening a FIFO waits for a writer, and a device need not end.
    """
    check_plain(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(
            f"{path}: files with the suffix {path.suffix or '(none)'} are not read",
            f"give {READ}",
        )


def check_plain(path: Path) -> None:
    """Refuse what is no plain file. Errors: `DataError`, `UnsafeInputError`."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DataError(
            f"{path}: no such file", f"check the path; what is read: {READ}, or a hub id"
        ) from error
    except OSError as error:
        raise from_os_error(error) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a directory", "name a file in it")
    if not stat.S_ISREG(mode):
        raise UnsafeInputError(
            f"{path}: is a pipe, socket or device", "write the rows to a .jsonl file first"
        )


MAX_ROW_BYTES = size_bytes(DataConfig.max_row_size)
"""A longer row is refused, so that a file without ends cannot fill the memory."""

CHUNK = 1024**2


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A plain file, open for reading. Errors: those of `check_file`, and `ResourceError`."""
    check_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise from_os_error(error) from error
    with file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        try:
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}:1: not gzip: {error}", "pack the file again") from error


def too_long(what: str, limit: int) -> DataError:
    """The error for a line, a value or a row that is longer than `limit` bytes."""
    return DataError(
        f"{what} is longer than {limit / 1024**2:.4g} MiB",
        "write one row per line and shorter ones, or raise --max_row_size",
    )


def lines(path: Path, limit: int = MAX_ROW_BYTES) -> Iterator[tuple[int, int, bytes]]:
    """`(line, offset in the file, bytes)` of every line, the byte order mark taken off."""
    offset = 0
    with opened(path) as file:
        for line in itertools.count(1):
            raw = file.readline(limit + 1)
            if not raw:
                return
            start = offset
            offset += len(raw)
            if len(raw) > limit:
                raise too_long(f"{path}:{line}: the line", limit)
            if line == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(
                        f"{path}:{line}: byte offset 0: UTF-16", "save the file as UTF-8"
                    )
                if raw.startswith(codecs.BOM_UTF8):
                    raw, start = raw[3:], 3
            yield line, start, raw


def decoded(raw: bytes, offset: int, where: str) -> str:
    """The text of a line that begins at `offset`, or `DataError` with the bad byte's place."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte 0x{raw[error.start]:02x} at byte offset {error.start} of the line "
            f"({offset + error.start} of the file) is not UTF-8",
            "save the file as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: NUL at byte offset {offset + raw.index(0)}: UTF-16, or no text at all",
            "save the file as UTF-8",
        )
    return text


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows that a program hands over in place of a file: a list of dicts, or a `datasets.Dataset`.

    They are read as JSON lines are, so that a row is what it would be in a file.
    """

    rows: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        return "rows"

    @property
    def name(self) -> str:
        """What a run writes down for `--data`: the same rows have the same name."""
        return f"rows:{self.digest[:12]}"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all rows as JSON lines. Errors: `DataError` for what is not JSON."""
        found = hashlib.sha256()
        for _, line in self.lines():
            found.update(line + b"\n")
        return found.hexdigest()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The number of each row, from 1, and its JSON. Errors: `DataError`."""
        for number, row in enumerate(self.rows, 1):
            value = dict(row) if isinstance(row, Mapping) else row
            try:
                text = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"{self}:{number}: is no JSON: {error}",
                    "give dicts of texts, numbers, booleans, lists and dicts",
                ) from error
            yield number, text.encode("utf-8", errors="surrogatepass")


def given_rows(option: str, value: Any) -> GivenRows | None:
    """The rows that a program gives for an option; None where it names files.

    Errors: `ConfigError` for what is no list of rows, `DataError` for one that is empty.
    """
    is_list = isinstance(value, (list, tuple))
    if value is None or isinstance(value, (str, os.PathLike)):
        return None
    if is_list and value and all(isinstance(one, str) for one in value):
        return None  # several files
    if hasattr(value, "columns"):
        # Gone through, pandas gives its columns' names and polars its columns.
        raise ConfigError(
            f"{option} is given a {type(value).__name__}, which is a table of columns",
            "give its rows: data.to_dict('records') of pandas, data.to_dicts() of polars, "
            "data.to_pylist() of pyarrow",
        )
    # Of a `datasets.Dataset` no more is asked than that its rows can be gone through again.
    if not is_list and (isinstance(value, Mapping) or not hasattr(value, "__getitem__")):
        raise ConfigError(
            f"{option} is given a {type(value).__name__}",
            "give a list of dicts, a datasets.Dataset (of several splits one), or the name of a "
            "file",
        )
    if not len(value):
        raise DataError(f"{option}: holds no row", "give at least one")
    return GivenRows(value)

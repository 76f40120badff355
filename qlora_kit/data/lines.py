"""Which files are read, and their bytes as lines: plain file, length and UTF-8 are checked first.

A file whose name ends in `.gz` is unpacked as it is read.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qlora_kit.config.data import DataConfig
from qlora_kit.errors import DataError, UnsafeInputError, from_os_error
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

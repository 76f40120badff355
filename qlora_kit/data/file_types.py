"""Which files are read, by their names, and what is no plain file, refused before it is opened."""

from __future__ import annotations

import stat
from pathlib import Path

from qlora_kit.errors import DataError, UnsafeInputError, from_os_error

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

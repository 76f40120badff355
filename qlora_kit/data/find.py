"""A name to the files or hub splits that are trained on and held out; nothing is read here.

A name is a sample of the package, a file, a directory with `train.*` and perhaps `valid.*` or
`test.*`, or a hub id: `owner/name`, or `owner/name:subset`. What is a path is decided as for
models: it starts with `.`, `/` or `~`, has other than one `/`, or its first part is a directory.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import DataError, UnsafeInputError, from_os_error

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
HELD_OUT = ("valid", "validation", "test")
"""The stems of a directory's held-out file, the first one that is there."""

READ = "a .jsonl, .json, .csv, .parquet or .txt file, or a directory with train.*"


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set on the hub; `subset` is the hub's word for a named part."""

    name: str
    subset: str | None
    split: str

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return f"{self.name}{subset}/{self.split}"


Source = Path | HubSplit


def find(data: str) -> tuple[Source, Source | None]:
    """What `--data` means: what is trained on, and what is held out where that is given with it.

    Of a hub id the second is `validation`; whether there is one is known when it is loaded.
    """
    path = Path(os.path.expanduser(data))
    if data == "sample" or data.startswith("sample:"):
        names = sorted(item.name for item in SAMPLES.glob("*") if item.is_dir())
        name = data.partition(":")[2] or (names[0] if names else "")
        if name not in names:
            raise DataError(
                f"{data}: no such sample", f"the package has: {', '.join(names) or 'none'}"
            )
        path = SAMPLES / name
    elif is_hub_id(data):
        name, _, subset = data.partition(":")
        return HubSplit(name, subset or None, "train"), HubSplit(name, subset or None, "validation")
    if not path.is_dir():
        return path, None
    train = _table(path, "train")
    if train is None:
        raise DataError(
            f"{path}: the directory has no train.jsonl, .json, .csv, .parquet or .txt",
            "name a file in it",
        )
    return train, next((found for stem in HELD_OUT if (found := _table(path, stem))), None)


def is_hub_id(data: str) -> bool:
    """Whether a name means a data set on the hub; it is then no path here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) or data.startswith((".", "~")):
        return False
    if Path(data).suffix.lower() in SUFFIXES:
        return False
    return not os.path.isdir(data.split("/")[0])


def check_file(path: Path) -> None:
    """Before it is opened: opening a FIFO waits for a writer, and a device need not end."""
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
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: files with the suffix {path.suffix or '(none)'} are not read",
            f"give {READ}",
        )


def words(source: Source) -> str:
    """A source as people read it."""
    if isinstance(source, HubSplit):
        return str(source)
    in_sample = source.parent.parent == SAMPLES
    return f"sample:{source.parent.name}/{source.name}" if in_sample else source.name


def _table(directory: Path, stem: str) -> Path | None:
    """The directory's one file of that stem; a second, or one that is not read, is an error."""
    found = sorted(item for item in directory.iterdir() if item.name.split(".")[0] == stem)
    if len(found) > 1:
        raise DataError(
            f"{directory}: {found[0].name} and {found[1].name} both are its {stem} file",
            "keep one of them, or name a file",
        )
    if found and found[0].suffix.lower() not in SUFFIXES:
        check_file(found[0])
        return None
    return found[0] if found else None

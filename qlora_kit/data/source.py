"""A name to the files or hub splits that are trained on and held out; no row is read here.

A name is a sample of the package, a file, several files with commas between them or a pattern of
them, a directory with `train.*` and perhaps `valid.*` or `test.*`, or with what `save_to_disk` of
datasets writes, or a hub id: `owner/name`, or `owner/name:subset`. What is a path is decided as for
models: it starts with `.`, `/` or `~`, has other than one `/`, or its first part is a directory.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.data.json_text import loads
from qlora_kit.data.lines import SUFFIXES, GivenRows, check_file, check_plain, kind_of
from qlora_kit.errors import (
    ConfigError,
    DataError,
    QloraKitError,
    UnsafeInputError,
    redacted,
)

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
HELD_OUT = ("valid", "validation", "test")
"""The stems of a directory's held-out file, the first one that is there."""

STATE, SPLITS = "state.json", "dataset_dict.json"
"""The files by which `save_to_disk` lists the shards of a data set, and its splits."""

STATE_BYTES = 2**20
MOST_FILES = 10_000
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set on the hub; `subset` is the hub's word for a named part."""

    name: str
    subset: str | None
    split: str

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return f"{self.name}{subset}/{self.split}"


@dataclass(frozen=True)
class Files:
    """Several files that are read one after the other, under the name that means them."""

    name: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return self.name


GIVEN_NAME = re.compile(r"rows:[0-9a-f]{12}")
Part = Path | HubSplit | GivenRows
Source = Part | Files


def parts_of(source: Source) -> tuple[Part, ...]:
    """What of a source is opened, in its order."""
    return source.paths if isinstance(source, Files) else (source,)


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
        return files(data), None
    if (path / STATE).is_file():
        return _saved(path), None
    if (path / SPLITS).is_file():
        return _saved_splits(path)
    train = _table(path, "train")
    if train is None:
        raise DataError(
            f"{path}: the directory has no train.jsonl, .json, .csv, .parquet or .txt",
            "name a file in it",
        )
    return train, next((found for stem in HELD_OUT if (found := _table(path, stem))), None)


def files(names: str) -> Path | Files:
    """One file, or those of several names with commas between them, and of patterns.

    Errors: `DataError` for a pattern that nothing fits, `ConfigError` for a file named twice.
    """
    whole = Path(os.path.expanduser(names))
    if GIVEN_NAME.fullmatch(names) and not _lies_there(whole):
        raise DataError(
            f"{names}: a program handed these rows over, and they lie in no file",
            "hand them over again: finetune(data=rows, ...), or write them to a .jsonl file",
        )
    if _lies_there(whole) or not set(names) & set(",*?["):
        return whole
    paths: list[Path] = []
    for name in (part.strip() for part in names.split(",")):
        path = Path(os.path.expanduser(name))
        if _lies_there(path) or not set(name) & set("*?["):
            paths.append(path)
            continue
        fitting = glob.iglob(str(path), recursive=True)
        found = sorted(map(Path, itertools.islice(fitting, MOST_FILES + 1)))
        if not found:
            raise DataError(f"{name}: no file fits this pattern", "check the path and the pattern")
        if len(found) > MOST_FILES:
            raise DataError(
                f"{name}: more than {MOST_FILES:,} files fit this pattern", "narrow the pattern"
            )
        paths += [one for one in found if not one.is_dir()]
    seen: dict[str, Path] = {}
    for path in paths:
        same = seen.setdefault(os.path.realpath(path), path)
        if same is not path:
            raise ConfigError(f"{names}: {path} is named twice", "name every file once")
    return Files(names, tuple(paths)) if len(paths) > 1 else paths[0]


def local_files(data: str) -> Iterator[Path]:
    """The files here that rows of `--data` come from; none where it means no rows."""
    try:
        sources = find(data)
    except (QloraKitError, OSError, ValueError):
        return
    for source in sources:
        if source is not None:
            yield from (part for part in parts_of(source) if isinstance(part, Path))


def is_one_table(data: str) -> bool:
    """Whether a name means files without any that would be held out beside them."""
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        return (path / STATE).is_file()
    return not is_hub_id(data) and data.partition(":")[0] != "sample"


def is_hub_id(data: str) -> bool:
    """Whether a name means a data set on the hub; it is then no path here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) or data.startswith((".", "~")):
        return False
    if kind_of(Path(data)) in SUFFIXES:
        return False
    return not os.path.isdir(data.split("/")[0])


def lasting(data: str) -> str:
    """A name as it is kept: of a directory that is a hub id in another folder, its whole path.

    Anybody may own the name there.
    """
    here = os.path.isdir(data) and re.fullmatch(r"[\w.-]+/[\w.-]+", data)
    whole = os.path.realpath(data) if here else data
    return whole if redacted(whole) == whole else data


def words(source: Source) -> str:
    """A source as people read it."""
    if isinstance(source, HubSplit):
        return str(source)
    if isinstance(source, GivenRows):
        return f"{len(source.rows)} rows of the program"
    if isinstance(source, Files):
        return f"{source.name} ({len(source.paths)} files)"
    in_sample = source.parent.parent == SAMPLES
    return f"sample:{source.parent.name}/{source.name}" if in_sample else source.name


def _lies_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def _table(directory: Path, stem: str) -> Path | Files | None:
    """The directory's file of that stem, or its shards; a second file is an error."""
    found = sorted(
        item for item in directory.iterdir() if SHARD.sub("", item.name.split(".")[0]) == stem
    )
    shards = [item for item in found if SHARD.search(item.name.split(".")[0])]
    if len(found) > 1 and len(shards) == len(found):
        return Files(str(directory / f"{stem}-*"), tuple(shards))
    if len(found) > 1:
        raise DataError(
            f"{directory}: {found[0].name} and {found[1].name} both are its {stem} file",
            "keep one of them, or name a file",
        )
    if found and not found[0].name.lower().endswith(SUFFIXES):
        check_file(found[0])
        return None
    return found[0] if found else None


def _saved(directory: Path) -> Path | Files:
    """The shards of a data set that `save_to_disk` wrote."""
    path = directory / STATE
    state = _listing(path)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{path}:1: the data set is a selection of its rows",
            "save it after flatten_indices()",
        )
    shards = state.get("_data_files")
    names = [one.get("filename") for one in shards] if isinstance(shards, list) else []
    if not names:
        raise DataError(f'{path}:1: "_data_files" lists no file', "save the data set again")
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UnsafeInputError(
                f"{path}: lists {str(name)[:60]!r}, which is no file of the directory",
                "save the data set again",
            )
    paths = tuple(directory / name for name in names)
    return paths[0] if len(paths) == 1 else Files(str(directory), paths)


def _saved_splits(directory: Path) -> tuple[Source, Source | None]:
    """The splits of a `DatasetDict` that `save_to_disk` wrote."""
    path = directory / SPLITS
    splits = _listing(path).get("splits")
    if not isinstance(splits, list) or "train" not in splits:
        raise DataError(
            f'{path}:1: no split "train"', f"name the directory of a split in {directory}"
        )
    held_out = next((stem for stem in HELD_OUT if stem in splits), None)
    return _saved(directory / "train"), _saved(directory / held_out) if held_out else None


def _listing(path: Path) -> dict[str, object]:
    """A small JSON object that lists files."""
    check_plain(path)
    with path.open("rb") as file:
        raw = file.read(STATE_BYTES + 1)
    try:
        value = loads(raw.decode()) if len(raw) <= STATE_BYTES else None
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON: {error}", "save the data set again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:1: no object of JSON below 1 MiB", "save the data set again")
    return value

"""A quantized base on disk: what its manifest says, and which of them there are.

An entry is a directory of safetensors files and of `base.json`, written last, which has the SHA-256
of every tensor and of every header. It counts where it is this user's alone: whoever else could
write there could hand us weights. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.files.aside import mend_beside
from qlora_kit.files.opened import kept_in, open_own, open_own_folder

MANIFEST, MANIFEST_LIMIT = "base.json", 64 * 1024**2
FILE = "base-{:05}.safetensors"
OURS = re.compile(r"base\.json|base-\d{5}\.safetensors")
"""Names in an entry."""
NAMED = re.compile(r"(?P<name>[\w.-]{1,64})-[0-9a-f]{16}")
"""The name of an entry: of a base, and of all that it depends on."""
LEFT = re.compile(r"\.([\w.-]+-[0-9a-f]{16})\.\d+\.(tmp|old)")
"""What a killed process leaves of one."""
ATTEMPTS = 50
"""To hold a cache, a tenth of a second apart."""


@dataclass(frozen=True)
class KeptTensor:
    """Where a tensor lies in an entry: bytes `start` to `end` of `file`, and their SHA-256."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int
    sha256: str


@dataclass(frozen=True)
class KeptBase:
    """An entry, as its manifest has it.

    `settings` are those of which each has an entry of its own; `source` and `made_by` are what
    makes it one of another time. `tensors` are all of the model by name, `linears` the format of
    its quantized linears by name. `headers` are, by file, the bytes before its first tensor and
    their SHA-256. `made` is in seconds since 1970.
    """

    model: str
    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    made_by: Mapping[str, Any]
    made: float
    tensors: Mapping[str, KeptTensor]
    linears: Mapping[str, str]
    headers: Mapping[str, tuple[int, str]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.end - one.start for one in self.tensors.values())

    def as_json(self) -> bytes:
        """The manifest."""
        said = vars(self) | {"tensors": {name: vars(one) for name, one in self.tensors.items()}}
        return json.dumps(said | {"sum": _sum(said)}).encode()


def cache_directory() -> Path | None:
    """Where quantized bases are kept; None for a user without a home."""
    if named := os.environ.get("QLORA_KIT_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    return kept_in("bases")


def open_entry(path: Path) -> int:
    """The directory of an entry, open, to open its files in.

    Errors: `OSError`; `ValueError` where it, or what it lies in, is not this user's alone.
    """
    above = open_own_folder(path.parent, link=True)
    try:
        return open_own_folder(path.name, above)
    finally:
        os.close(above)


def read_manifest(path: Path) -> KeptBase:
    """What an entry says. Errors: `OSError`; `ValueError` where it is not as it was written."""
    folder = open_entry(path)
    try:
        with open_own(MANIFEST, folder) as file:
            raw = file.read(MANIFEST_LIMIT)
        said = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    finally:
        os.close(folder)
    if not isinstance(said, dict) or said.pop("sum", None) != _sum(said):
        raise ValueError(f"{path / MANIFEST}: is not as it was written")
    try:
        said["tensors"] = {
            name: KeptTensor(**{**one, "shape": tuple(one["shape"])})
            for name, one in said["tensors"].items()
        }
        said["headers"] = {name: (size, sha) for name, (size, sha) in said["headers"].items()}
        kept = KeptBase(**said)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST}: is not of this form") from error
    if kept.as_json() != raw:
        raise ValueError(f"{path / MANIFEST}: is not as it was written")
    return kept


def _sum(said: Mapping[str, Any]) -> str:
    text = json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True)
class Listed:
    """A directory of the cache: its bytes on disk, when it was last used, what it says if it can.

    `last_used` is in seconds since 1970.
    """

    path: Path
    nbytes: int
    last_used: float
    said: KeptBase | None


def listed(cache: Path) -> list[Listed]:
    """The entries of a cache, those used last first. Errors: `OSError`."""
    found = []
    for name in sorted(os.listdir(cache) if os.path.lexists(cache) else ()):
        path, said = cache / name, None
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or closed
            if not NAMED.fullmatch(name) or not is_entry(path):
                continue
            with contextlib.suppress(OSError, ValueError):
                said = read_manifest(path)
            size = sum(os.lstat(path / one).st_size for one in os.listdir(path))
            found.append(Listed(path, size, os.lstat(path).st_mtime, said))
    return sorted(found, key=lambda one: -one.last_used)


def is_entry(path: Path) -> bool:
    """Whether a directory is of this user and holds nothing but files of our names."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    return all(
        OURS.fullmatch(name) and stat.S_ISREG(os.lstat(path / name).st_mode)
        for name in os.listdir(path)
    )


@contextlib.contextmanager
def held(cache: Path) -> Iterator[int]:
    """A cache, open, whose names nobody else changes meanwhile.

    The lock is the kernel's, and goes with its holder. Errors: `OSError`, that of a lock which is
    not let go among them; `ValueError` for a directory that others may write to.
    """
    folder = open_own_folder(cache, link=True)
    try:
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: one writer is then the user's promise
        yield folder
    finally:
        os.close(folder)


def mend_cache(cache: Path) -> None:
    """Remove what killed processes left in a cache that is held, and nothing beside it."""
    for name in {left[1] for one in os.listdir(cache) if (left := LEFT.fullmatch(one))}:
        mend_beside(cache / name, is_entry)


def remove_left(cache: Path) -> None:
    """Remove what killed processes left in a cache. Errors: `OSError`, `ValueError`."""
    if cache.is_dir() and any(map(LEFT.fullmatch, os.listdir(cache))):
        with held(cache):
            mend_cache(cache)


def remove_entry(path: Path) -> None:
    """Delete an entry at once: no reader finds half of it.

    Errors: `OSError`; `ValueError` for what is none of ours.
    """
    with held(path.parent):
        if not is_entry(path):
            raise ValueError(f"{path} holds what is no quantized base of ours")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path / MANIFEST)  # from here on it is none
        mend_cache(path.parent)
        gone = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.rename(path, gone)
        shutil.rmtree(gone)

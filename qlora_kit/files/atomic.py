"""Files that are the old ones or the whole new ones, and where results may go.

`--overwrite` is for what a run or an export of ours made, which is told by its files: one mark that
nothing else leaves, and no name beside it that neither would have written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.files.lock import LOCK, check_free

PUBLISHING = (".export.new", ".export.part", ".export.old")
"""Folders of an export that is put into a directory file by file; see `publish.py`."""

EXPORT_REPORT = "export.json"
"""What an export says of itself."""
MARKS = {"run.json": {"config", "versions", "train"}, EXPORT_REPORT: {"merge_base", "dtype"}}
"""The file that a finished run and an export leave, and keys that it holds."""
MARK_LIMIT = 64 * 1024**2

MADE = re.compile(
    r"run\.json|export\.json|config\.(yaml|json)|metrics\.jsonl|README\.md|adapter"
    r"|adapter_(config\.json|model\.safetensors)|adapter\.gguf|Modelfile|checkpoint-\d+"
    r"|\.replaced(\.part)?"
    r"|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(special_)?token(izer|s_map)?(_config)?\.(json|model)|added_tokens\.json|merges\.txt"
    r"|vocab\.(json|txt|bpe)|spiece\.model|sentencepiece\.bpe\.model|chat_template\.(jinja|json)"
    r"|additional_chat_templates|model-\w+\.gguf|\..+\.\d+\.(tmp|old)"
    # What trackers keep beside a run.
    r"|qlora-kit|wandb|mlruns|mlartifacts|dvclive|swanlog|trackio|\.?aim"
)
"""Names in the directory of a run or an export; a run's own folder for a killed run's old files."""


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`: written aside, synced, renamed; the mode follows the umask."""
    replace_file(path, lambda aside: write_plain(aside, content))


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file aside, then sync and rename it to `path`.

    A link at `path` stays, and what it points to is replaced. A failure leaves what was there,
    and no temporary file. Errors: `ResourceError` where something else than a file is there.
    """
    path = real_path(path)
    if path.exists() and not path.is_file():
        raise ResourceError(f"{path}: is not a regular file", "choose another place")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        # Libraries that write through a temporary file of their own leave it readable to one user.
        os.chmod(aside, 0o666 & ~_umask())
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def real_path(path: Path) -> Path:
    """The place that a path leads to, whole, and its links followed; a loop of links stays one."""
    # `Path.resolve` raises for a loop, and what it raises has changed between versions of Python.
    return Path(os.path.realpath(path))


def write_plain(path: Path, content: bytes) -> None:
    """Make or replace a file in place, not synced: for directories that are moved when whole."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError as error:
        error.filename = str(path)  # the call knows a number only
        raise
    finally:
        os.close(handle)


def check_output(
    path: Path, overwrite: bool, inputs: Sequence[Path] = (), goes_on: bool = False
) -> None:
    """Refuse a directory that cannot take the results, before any work is done.

    `inputs` are files and directories that are read: the output may not be one of them, hold one,
    or lie in one. `overwrite` replaces what a run or an export made, and nothing else; `goes_on`
    leaves what is there. Errors: `ConfigError`, and `ResourceError` for a place that cannot be
    written to, or that somebody writes to.
    """
    real = real_path(path)
    if any(part.is_symlink() for part in (real, *real.parents)):
        raise ConfigError(f"--output_dir {path} is a loop of links", "choose another place")
    for read in map(real_path, inputs):
        if real.is_relative_to(read) or read.is_relative_to(real):
            raise ConfigError(
                f"--output_dir {path} overlaps with {read}, which is read", "choose another place"
            )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output_dir {path} is a file", "choose a directory")
    present = contents(real) if path.is_dir() else []
    if present and overwrite:
        check_free(real)
        if why := _precious(real, present):
            raise ConfigError(
                f"--output_dir {path} {why}",
                "choose another place: --overwrite replaces what a run or an export made",
            )
    elif present and not goes_on:
        may = "" if _precious(real, present) else ", or give --overwrite"
        raise ConfigError(f"--output_dir {path} is not empty", f"choose another place{may}")
    place = real
    while not place.exists():
        place = place.parent
    if not stat.S_ISDIR(place.stat().st_mode):
        raise ResourceError(f"--output_dir {path}: {place} is a file", "choose another place")
    # With what the process may do now, which capabilities and set ids make other than its user.
    effective = os.access in os.supports_effective_ids
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
        raise ResourceError(
            f"--output_dir {path}: {place} may not be written to", "choose another place"
        )


def contents(path: Path) -> list[str]:
    """What a directory holds for its user: no lock, no half-made export, no `lost+found`."""
    found = [name for name in os.listdir(path) if name not in (LOCK, *PUBLISHING)]
    # Every new ext4 volume has one, and only root may look into it.
    if "lost+found" in found and (path / "lost+found").stat().st_uid == 0:
        found.remove("lost+found")
    return sorted(found)


def _precious(real: Path, present: Sequence[str]) -> str | None:
    """Why a directory is not to be replaced; None for what a run or an export made."""
    if ".git" in present:
        return "is a git checkout"
    if Path(os.path.realpath(os.path.expanduser("~"))).is_relative_to(real):
        return "is or holds the home directory"
    if is_worked_in(real):
        return "is or holds the working directory"
    for name in present:
        if not MADE.fullmatch(name):
            return f"holds {name}, which no run and no export made"
    return None if _is_made(real, present) else "holds neither a run nor an export"


def is_worked_in(path: Path) -> bool:
    """Whether the working directory is `path` or below it."""
    with contextlib.suppress(FileNotFoundError):  # it was removed
        return Path.cwd().is_relative_to(path)
    return False


def _is_made(real: Path, present: Sequence[str]) -> bool:
    """Whether a directory has what only a run or an export leaves."""
    for name, keys in MARKS.items():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            status = os.lstat(real / name)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MARK_LIMIT:
                said = json.loads((real / name).read_bytes())
                if isinstance(said, dict) and keys <= said.keys():
                    return True
    # A run that was killed.
    if any((real / name / "manifest.json").is_file() for name in present):
        return True
    lock = real / LOCK
    if lock.is_symlink() or not lock.is_file() or lock.stat().st_size > 40:
        return False
    return re.fullmatch(rb"\d+( replaces)?\n", lock.read_bytes()) is not None


def clear_stale(directory: Path) -> None:
    """Undo what killed writers left in a directory: half-written files go, old ones come back.

    Only for a directory that nobody writes to meanwhile.
    """
    for entry in sorted(directory.iterdir()):
        found = re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", entry.name)
        if not found:
            continue
        whole = directory / found[1]
        if found[2] == "old" and not whole.exists():
            os.rename(entry, whole)
        else:
            remove(entry)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def check_room(directory: Path, needed: int, what: str) -> None:
    """Refuse to write `needed` bytes where less is free.

    Errors: `ResourceError` with both numbers, `what` in words.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    stats = os.statvfs(place)
    if not stats.f_blocks:  # as /proc and /sys are: nothing that is freed makes it room
        raise ResourceError(
            f"{directory}: its file system offers no room for files",
            "choose another place with --output_dir",
        )
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise ResourceError(
            f"{directory}: {what} needs {needed} bytes, and {free} are free",
            "free some space or choose another place with --output_dir",
        )


def without_folders(said: str, *folders: Path) -> str:
    """A message for others: paths in `folders` are those from there, and these have no name."""
    for folder in folders:
        said = said.removeprefix(f"{folder}: ")
        for name in {os.path.abspath(folder), os.path.realpath(folder)}:
            said = said.replace(f"{name}{os.sep}", "").replace(f"{name}: ", "").replace(name, ".")
    return said


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

"""Files and directories that are the old ones or the whole new ones, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qlora_kit.errors import ConfigError, ResourceError


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`: written aside, synced, renamed; the mode follows the umask."""
    replace_file(path, lambda aside: write_plain(aside, content))


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file aside, then sync and rename it to `path`.

    A link at `path` stays, and what it points to is replaced. A failure leaves what was there,
    and no temporary file. Errors: `ResourceError` where something else than a file is there.
    """
    path = path.resolve()
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


def write_plain(path: Path, content: bytes) -> None:
    """Make or replace a file in place, not synced: for directories that are moved when whole."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)


def check_output(path: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a directory that cannot take the results, before any work is done.

    `inputs` are files and directories that are read: the output may not be one of them, hold one,
    or lie in one. Errors: `ConfigError`, and `ResourceError` for a place that cannot be written to.
    """
    real = path.resolve()
    for read in (read.resolve() for read in inputs):
        if real.is_relative_to(read) or read.is_relative_to(real):
            raise ConfigError(
                f"--output_dir {path} overlaps with {read}, which is read", "choose another place"
            )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output_dir {path} is a file", "choose a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(
            f"--output_dir {path} is not empty", "choose another place, or give --overwrite"
        )
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    if not stat.S_ISDIR(parent.stat().st_mode):
        raise ResourceError(f"--output_dir {path}: {parent} is a file", "choose another place")
    if not os.access(real if real.exists() else parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"--output_dir {path}: {parent} may not be written to", "choose another place"
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to fill; it takes the place of `path` when the block ends well.

    What was at `path` stays until then, and stays for good when the block raises.
    """
    path = path.resolve()
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    moved = False
    # A killed process that had this one's id may have left some.
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.mkdir(aside)
        yield aside
        for file in aside.rglob("*"):
            sync(file)
        sync(aside)
        if path.exists():
            os.rename(path, old)
        os.rename(aside, path)
        moved = True
        sync(path.parent)
    except BaseException:
        shutil.rmtree(path if moved else aside, ignore_errors=True)
        if old.exists():
            os.rename(old, path)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


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
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise ResourceError(
            f"{directory}: {what} needs {needed} bytes, and {free} are free",
            "free some space or choose another place with --output_dir",
        )


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

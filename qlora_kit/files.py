"""Files and directories that are the old ones or the whole new ones, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qlora_kit.errors import ConfigError, ResourceError


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`: written aside, synced, renamed; the mode follows the umask."""
    replace_file(path, lambda aside: _write(aside, content))


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file aside, then sync and rename it to `path`.

    A failure leaves what was at `path`, and no temporary file.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        # Libraries that write through a temporary file of their own leave it readable to one user.
        os.chmod(aside, 0o666 & ~_umask())
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def check_output(path: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a directory that cannot take the results, before any work is done.

    `inputs` are directories that are read: the output may not be one of them, hold one, or lie in
    one. Errors: `ConfigError`, and `ResourceError` for a place that cannot be written to.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def filled_directory(path: Path) -> Iterator[Path]:
    """The directory `path`, empty, to fill while a run goes on.

    When the block raises, what was there before comes back; a new directory is removed, unless
    something was already reported in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    path.mkdir()
    try:
        yield path
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists():
            shutil.rmtree(path)
            old.rename(path)
        elif not any(file.stat().st_size for file in path.iterdir()):
            shutil.rmtree(path)
        raise


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sync(path: Path) -> None:
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

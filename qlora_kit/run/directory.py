"""A run's directory: one writer, and what was there before kept until there is something better.

While a run writes, the directory holds a lock file with its process id. The lock is the kernel's
(flock), so that it ends with its holder however that dies; a file without a living holder says
that a run was interrupted, and what it was about to do.

With `--overwrite`, what was there is moved into a hidden folder of the same directory. It comes
back if the run leaves nothing to go on from, and goes once there is a checkpoint or a result. A
run that was killed leaves it there for the next one. Nothing outside the directory is touched.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.files.atomic import MADE, clear_stale, remove, sync
from qlora_kit.files.lock import LOCK, locked
from qlora_kit.training.checkpoint_folder import numbered

RESULT = "run.json"
"""Written last: where it is, the run is finished."""
CONFIG = "config.yaml"
"""The options of the run, which `--config` takes."""
REPLACED, REPLACING = ".replaced", ".replaced.part"


class Content(enum.Enum):
    """What a directory holds for a run that wants to write there."""

    NOTHING = enum.auto()
    INTERRUPTED = enum.auto()
    FINISHED = enum.auto()
    OTHER = enum.auto()


def content_of(path: Path) -> Content:
    """What is at `path`, without changing it."""
    names = set(os.listdir(path)) if path.is_dir() else set()
    if not names:
        return Content.NOTHING
    if names == {LOCK}:  # killed in its first moments, perhaps before it wrote its process id
        return Content.INTERRUPTED
    if (path / REPLACING).exists():
        return Content.INTERRUPTED
    if (path / RESULT).exists():
        return Content.FINISHED
    if (path / REPLACED).exists() or numbered(path)[0] or _is_new_run(path / LOCK):
        return Content.INTERRUPTED
    return Content.OTHER


def _is_new_run(lock: Path) -> bool:
    """Whether a lock file says that all that lies beside it is a run's own."""
    if lock.is_symlink() or not lock.is_file():  # reading a pipe would wait for ever
        return False
    with contextlib.suppress(FileNotFoundError):
        return re.fullmatch(rb"\d+\n", lock.read_bytes()) is not None
    return False


@contextlib.contextmanager
def run_directory(path: Path, overwrite: bool, *, fresh: bool = False) -> Iterator[RunDirectory]:
    """Be the only writer of `path` and fill it; a `fresh` one was not there before.

    A block that raises before it called `keep` leaves what was there before, and nothing else.
    Errors: `ResourceError` with the process that holds the directory, `FileExistsError` where it
    is to be fresh and is not.
    """
    made = _make(path, fresh)
    try:
        with locked(path, " replaces" if overwrite else ""):
            # A run that was killed while it moved things aside is still to replace them.
            overwrite = overwrite or (path / REPLACING).exists()
            _recover(path)
            try:
                directory = RunDirectory(path, overwrite)
            except BaseException:
                _put_back(path)
                raise
            try:
                yield directory
            except BaseException:
                directory.undo()
                raise
            directory.keep()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: something is kept
                folder.rmdir()


class RunDirectory:
    """A directory that is held; `keep` says that from here on its content is worth having."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        if overwrite:
            _set_aside(path)
        self._before = set(os.listdir(path))
        # What an interrupted run left is as good as what this one makes of it.
        self._kept = bool(numbered(path)[0])

    def keep(self) -> None:
        """Let go of what was there before: a checkpoint or the result stands now."""
        self._kept = True
        if (self.path / REPLACED).exists():
            remove(self.path / REPLACED)

    @contextlib.contextmanager
    def result(self) -> Iterator[Path]:
        """A folder to fill: its files move into the directory when the block ends well.

        `run.json` comes last and makes the run a finished one.
        """
        aside = self.path / f".result.{os.getpid()}.tmp"
        os.mkdir(aside)
        try:
            yield aside
            names = sorted(os.listdir(aside), key=lambda name: name == RESULT)
            for name in names:
                sync(aside / name)
            for name in names:
                if name == RESULT:
                    sync(self.path)  # what it stands for is on the disk before it is
                os.replace(aside / name, self.path / name)
            sync(self.path)
        finally:
            remove(aside)

    def undo(self) -> None:
        """Take back everything that was written, unless it is to be kept.

        What is no run's by its name, somebody put there meanwhile: it stays.
        """
        clear_stale(self.path)
        if self._kept:
            return
        for name in set(os.listdir(self.path)) - self._before:
            if MADE.fullmatch(name):
                remove(self.path / name)
        _put_back(self.path)


def _make(path: Path, fresh: bool) -> list[Path]:
    """Make a directory and its parents; the new ones, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=not fresh)
    return missing


def _recover(path: Path) -> None:
    """Undo what a killed run left half done; what it replaced waits on, or goes."""
    clear_stale(path)
    if (path / REPLACING).exists():
        _move_back(path / REPLACING, path)
    if not (path / REPLACED).exists():
        return
    if numbered(path)[0] or (path / RESULT).exists():
        remove(path / REPLACED)
        return
    for entry in list(path.iterdir()):
        if entry.name not in (LOCK, REPLACED):
            remove(entry)


def _set_aside(path: Path) -> None:
    if (path / REPLACED).exists():
        return  # by the run that was killed: nothing came since
    os.mkdir(path / REPLACING)
    for entry in list(path.iterdir()):
        if entry.name not in (LOCK, REPLACING):
            os.rename(entry, path / REPLACING / entry.name)
    os.rename(path / REPLACING, path / REPLACED)


def _put_back(path: Path) -> None:
    if (path / REPLACED).exists():
        # Under the first name again: a kill in the middle of moving goes on from there.
        os.rename(path / REPLACED, path / REPLACING)
    if (path / REPLACING).exists():
        _move_back(path / REPLACING, path)


def _move_back(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        os.rename(entry, target / entry.name)
    source.rmdir()

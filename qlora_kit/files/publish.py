"""A directory that is the old one or the whole new one, whatever happens meanwhile.

It is filled beside its place, synced and renamed (`aside.py`); `mend`, which every new one begins
with, undoes or completes what a kill left.

A directory that cannot be renamed (a mount point, as a container's volume is; one's own in a parent
that is not; the working directory) is filled from the inside instead, and its lock must be held:

1. the new files are made in `.export.new`;
2. the old ones move into `.export.part`, config.json first, so that no half of a model is read;
3. `.export.part` is renamed to `.export.old`: from here on the new files count;
4. the new ones move up, config.json last, and the folders go.

A kill before 3 is undone by the next run, and one after 3 is completed by it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qlora_kit.errors import ResourceError
from qlora_kit.files.aside import discard, folder_beside, mend_beside, new_directory, sync_all
from qlora_kit.files.atomic import PUBLISHING, contents, is_worked_in, sync
from qlora_kit.files.lock import locked

FIRST = "config.json"
"""Without it nothing reads a model: it goes first and comes last."""

Listing = dict[str, tuple[int, ...]]
"""Every file of a directory, and what tells it from another of its name."""


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A folder to fill, whose files are at `path` when the block ends well.

    What is at `path` now is replaced; it stays until then, and for good when the block raises.
    What comes there meanwhile is not lost. Errors: `ResourceError` naming it, or the process that
    writes to `path`.
    """
    path = path.resolve()
    mend(path)
    with contextlib.ExitStack() as held:
        if path.is_dir():
            held.enter_context(locked(path, " exports"))
        before = _listing(path)

        def check(place: Path) -> None:
            came = sorted(_listing(place).items() - before.items())
            if came or place.is_symlink() or not place.is_dir():
                raise ResourceError(
                    f"{path / came[0][0] if came else path} came there, or was changed, while the "
                    "export was made",
                    "move it away, or choose another --output_dir, and export again",
                )

        if path.is_dir() and not _is_movable(path):
            names = sorted({Path(name).parts[0] for name in before})
            yield held.enter_context(_inside(path, names, check))
        else:
            yield held.enter_context(new_directory(path, check))


def mend(path: Path) -> None:
    """Undo or complete what killed processes left of new directories at `path`."""
    path = Path(os.path.realpath(path))  # which takes a loop of links for what it is
    mend_beside(path)
    if any((path / name).exists() for name in PUBLISHING):
        with locked(path, " exports"):
            if (path / PUBLISHING[2]).exists():
                _go_forward(path)
            else:
                _go_back(path)


def _is_movable(path: Path) -> bool:
    """Whether a directory can give its place to another by renaming; the kernel is asked.

    To rename it to a folder that is not empty is always refused, and that is the last thing to be
    checked: a mount point, a parent that may not be written to, a layer of an overlay are refused
    with other errors before. Nothing moves.
    """
    if is_worked_in(path):
        return False  # who works there would work in a folder that is gone
    try:
        aside, handle = folder_beside(path)
    except OSError:
        return False
    try:
        os.mkdir(aside / "x")
        os.rename(path, aside)
    except OSError as error:
        return error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(handle)
    raise AssertionError


@contextlib.contextmanager
def _inside(path: Path, names: list[str], check: Callable[[Path], None]) -> Iterator[Path]:
    """A folder in `path` to fill, whose files replace those of `names` there: the four steps."""
    new, part, old = (path / name for name in PUBLISHING)
    try:
        os.mkdir(new)
        yield new
        sync_all(new)
        check(path)
        os.mkdir(part)
        _move(_in_order(names), path, part)
        sync(part)
        sync(path)
        os.rename(part, old)
    except BaseException:
        if not old.exists():
            _go_back(path)
        raise
    try:
        _go_forward(path)
    except BaseException:  # a signal, perhaps: what counts is complete before it is obeyed
        _go_forward(path)
        raise


def _go_back(path: Path) -> None:
    """The old files are in their place again, and the new ones gone."""
    new, part, _ = (path / name for name in PUBLISHING)
    if part.exists():
        _move(reversed(_in_order(os.listdir(part))), part, path)
        part.rmdir()
    if new.exists():
        shutil.rmtree(new)


def _go_forward(path: Path) -> None:
    """The new files are in their place, and the old ones gone."""
    new, _, old = (path / name for name in PUBLISHING)
    if new.exists():
        _move(reversed(_in_order(os.listdir(new))), new, path)
        sync(path)
        new.rmdir()
    discard(old)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files; `ResourceError` where one of that name has come. Nothing is written over."""
    for name in names:
        if os.path.lexists(target / name):
            raise ResourceError(
                f"{target / name} came there while an export was put in its place",
                "move it away, and export again",
            )
        os.rename(source / name, target / name)


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != FIRST, name))


def _listing(path: Path) -> Listing:
    """What is in a directory; a link is what it is, not what it points to."""
    found: Listing = {}
    for top in contents(path) if path.is_dir() else ():
        for entry in (path / top, *(path / top).rglob("*")):
            try:
                status = os.lstat(entry)
            except FileNotFoundError:  # gone meanwhile
                continue
            known = (status.st_ino, status.st_size, status.st_mtime_ns)
            is_folder = stat.S_ISDIR(status.st_mode)
            found[str(entry.relative_to(path))] = () if is_folder else known
    return found

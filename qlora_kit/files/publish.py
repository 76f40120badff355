"""A directory that is the old one or the whole new one, whatever happens meanwhile.

It is filled aside, as `.NAME.N.tmp` beside its place, synced and renamed; what it replaces is
`.NAME.N.old` for as long as the two renames take. A kill leaves one or both of them: `mend`, which
every new one begins with, puts the old one back, or removes what is no longer needed. The folder
aside is locked (flock) while its process lives, so that nobody mends under a living one.

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
import fcntl
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qlora_kit.errors import ResourceError
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


@contextlib.contextmanager
def new_directory(path: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A directory beside `path` to fill; it takes the place of `path` when the block ends well.

    What was at `path` stays until then, and stays for good when the block raises. `check` is called
    with where that lies, out of everybody's way, and may raise to keep it.
    """
    path = path.resolve()
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend_beside(path)
    aside, handle = _folder_beside(path)
    old = aside.with_suffix(".old")
    try:
        yield aside
        _sync_all(aside)
        if os.path.lexists(path):
            if path.is_dir():
                shutil.copymode(path, aside)
            os.rename(path, old)
            if check is not None:
                check(old)
        os.rename(aside, path)
        sync(path.parent)
    except BaseException:
        if aside.exists():  # not yet moved
            if os.path.lexists(old):
                os.rename(old, path)
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()
        raise
    finally:
        os.close(handle)
        if not aside.exists() and path.exists():
            _discard(old)


def mend(path: Path) -> None:
    """Undo or complete what killed processes left of new directories at `path`."""
    path = Path(os.path.realpath(path))  # which takes a loop of links for what it is
    _mend_beside(path)
    if any((path / name).exists() for name in PUBLISHING):
        with locked(path, " exports"):
            if (path / PUBLISHING[2]).exists():
                _go_forward(path)
            else:
                _go_back(path)


def _mend_beside(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(?:tmp|old)")
    try:
        names = os.listdir(path.parent)
    except OSError:  # not there, or not ours to look into: then we made nothing in it
        return
    for number in {int(found[1]) for name in names if (found := pattern.fullmatch(name))}:
        aside, old = (path.with_name(f".{path.name}.{number}.{kind}") for kind in ("tmp", "old"))
        if not all(_is_own(folder) for folder in (aside, old) if os.path.lexists(folder)):
            continue
        handle = None
        if aside.exists():
            try:
                handle = _hold(aside, number)
            except (BlockingIOError, FileNotFoundError):  # its process lives, or is just done
                continue
        try:
            if old.exists() and aside.exists() and (not path.exists() or _is_empty(path)):
                os.rename(old, path)  # killed between its two renames
            elif old.exists() and aside.exists():
                continue  # and then something else came to its place: neither is ours to remove
            elif old.exists() and not path.exists():
                os.rename(old, path)
            else:
                _discard(old)
            _discard(aside)
        finally:
            if handle is not None:
                os.close(handle)


def _folder_beside(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the open file that holds it."""
    for number in itertools.count(os.getpid()):
        aside = path.with_name(f".{path.name}.{number}.tmp")
        if os.path.lexists(aside.with_suffix(".old")):
            continue
        try:
            os.mkdir(aside)
        except FileExistsError:
            continue
        # Another process may take it for a dead one's until it is locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError, NotADirectoryError):
            handle = _hold(aside, os.getpid())
            if aside.exists() and os.path.samestat(os.fstat(handle), os.stat(aside)):
                return aside, handle
            os.close(handle)
    raise AssertionError


def _hold(folder: Path, process: int) -> int:
    """Lock a folder for as long as the file that is returned stays open.

    Errors: `BlockingIOError` where a living process holds it. Where the file system has no locks,
    `process`, which made it, is asked for instead.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        if process != os.getpid() and _lives(process):
            os.close(handle)
            raise BlockingIOError from None
    return handle


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_movable(path: Path) -> bool:
    """Whether a directory can give its place to another by renaming; the kernel is asked.

    To rename it to a folder that is not empty is always refused, and that is the last thing to be
    checked: a mount point, a parent that may not be written to, a layer of an overlay are refused
    with other errors before. Nothing moves.
    """
    if is_worked_in(path):
        return False  # who works there would work in a folder that is gone
    try:
        aside, handle = _folder_beside(path)
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
        _sync_all(new)
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
    _discard(old)


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


def _is_own(folder: Path) -> bool:
    """Whether we made a folder: another user may leave one of that name where anybody may write."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not os.listdir(path)


def _discard(path: Path) -> None:
    """Remove what is no longer needed; what cannot be removed stays for the next run."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)

"""A directory filled beside its place, as `.NAME.N.tmp`, and put there by renaming.

What it replaces is `.NAME.N.old` for as long as the two renames take. A kill leaves one or both of
them: `mend_beside` puts the old one back, or removes what is no longer needed. The folder aside is
locked (flock) while its process lives, so that nobody mends under a living one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_kit.files.atomic import sync


def is_own_folder(folder: Path) -> bool:
    """Whether we made a folder: another user may leave one of that name where anybody may write."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


@contextlib.contextmanager
def new_directory(
    path: Path,
    check: Callable[[Path], None] | None = None,
    mode: int | None = None,
    is_ours: Callable[[Path], bool] = is_own_folder,
) -> Iterator[Path]:
    """A directory beside `path` to fill; it takes the place of `path` when the block ends well.

    What was at `path` stays until then, and stays for good when the block raises. `check` is called
    with where that lies, out of everybody's way, and may raise to keep it. Its `mode` is that of
    what was there, or what the umask says, unless it is given. `is_ours` is `mend_beside`'s.
    """
    path = path.resolve()
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_beside(path, is_ours)
    aside, handle = folder_beside(path)
    old = aside.with_suffix(".old")
    try:
        if mode is not None:
            os.chmod(aside, mode)
        yield aside
        sync_all(aside)
        if os.path.lexists(path):
            if path.is_dir() and mode is None:
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
            discard(old)


def is_being_made(path: Path) -> bool:
    """Whether a living process fills a directory beside `path`."""
    for number in _numbers(path):
        aside = path.with_name(f".{path.name}.{number}.tmp")
        try:
            os.close(_hold(aside, number))
        except BlockingIOError:
            return True
        except OSError:  # it is gone, or none
            continue
    return False


def mend_beside(path: Path, is_ours: Callable[[Path], bool] = is_own_folder) -> None:
    """Undo or complete what killed processes left of new directories beside `path`.

    Only folders that are ours, as `is_ours` says of each, are moved or removed.
    """
    for number in _numbers(path):
        aside, old = (path.with_name(f".{path.name}.{number}.{kind}") for kind in ("tmp", "old"))
        try:
            if not all(is_ours(folder) for folder in (aside, old) if os.path.lexists(folder)):
                continue
        except OSError:  # its process is just done, or it is closed
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
                discard(old)
            discard(aside)
        finally:
            if handle is not None:
                os.close(handle)


def _numbers(path: Path) -> set[int]:
    """The numbers of what is beside `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(?:tmp|old)")
    try:
        names = os.listdir(path.parent)
    except OSError:  # not there, or not ours to look into: then we made nothing in it
        return set()
    return {int(found[1]) for name in names if (found := pattern.fullmatch(name))}


def folder_beside(path: Path) -> tuple[Path, int]:
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


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not os.listdir(path)


def discard(path: Path) -> None:
    """Remove what is no longer needed; what cannot be removed stays for the next run."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)

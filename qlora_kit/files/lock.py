"""One writer to a directory: a lock file with its process id, held as long as the process lives.

The lock is the kernel's (flock), so that it ends with its holder however that dies; a file without
a living holder says that a run was interrupted, and what it was about to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.errors import ResourceError, UnsafeInputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(path: Path, does: str = "") -> Iterator[None]:
    """Be the only writer of a directory; `does` is written behind the process id.

    Errors: `ResourceError` with the process that holds it, `UnsafeInputError` for a lock file that
    is none.
    """
    while True:
        handle = _open(path / LOCK)
        _take(handle, path)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path / LOCK)):
                break
        os.close(handle)  # its holder removed it between our two calls
    try:
        # Over the old text and then cut: a kill in between never leaves an empty file here.
        text = f"{os.getpid()}{does}\n".encode()
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))
        yield
    finally:
        try:
            # Not where the directory was removed, or was replaced by another with its own lock.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.path.samestat(os.fstat(handle), os.stat(path / LOCK)):
                    os.unlink(path / LOCK)
        finally:
            os.close(handle)


def check_free(path: Path) -> None:
    """Refuse a directory that somebody writes to. Errors: `ResourceError`."""
    if (path / LOCK).is_symlink() or not (path / LOCK).is_file():
        return
    try:
        handle = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or not ours to read: writing will tell
        return
    _take(handle, path)
    os.close(handle)


def _take(handle: int, path: Path) -> None:
    """Lock an open file; it is closed where that fails."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 40).split()
        os.close(handle)
        process = holder[0].decode(errors="replace") if holder else "(starting)"
        raise ResourceError(
            f"--output_dir {path} is in use by process {process}",
            "wait until it ends, or choose another place",
        ) from error
    except OSError as error:
        # A file system without locks: one writer is then the user's promise.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
            os.close(handle)
            raise


def _open(path: Path) -> int:
    """A file is made or opened; what a link points to is not for us to write to.

    Errors: `UnsafeInputError` for anything but a plain file.
    """
    if not path.is_symlink() and (path.is_file() or not path.exists()):
        # Between the look and this call a link may come.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    raise UnsafeInputError(f"{path}: is not a regular file", "choose another place")

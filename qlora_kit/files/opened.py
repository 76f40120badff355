"""Files that are opened once, and files that nobody else could have written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

MOST_OPEN = 256
"""Files that are open at the same time; a process may have 1,024."""


class OpenFiles(contextlib.ExitStack):
    """Gives each file opened for reading, without a buffer, until the block ends.

    Of more than `MOST_OPEN` files the first one is closed, and opened again where it is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, io.FileIO] = {}

    def open(self, path: Path) -> io.FileIO:
        """The file, at the place where the last reader left it. Errors: `OSError`."""
        if path not in self._files:
            if len(self._files) == MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = self.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115
        return self._files[path]


def kept_open(files: OpenFiles | None) -> AbstractContextManager[OpenFiles]:
    """`files`, which stay open behind the block; without them new ones, which do not."""
    return OpenFiles() if files is None else contextlib.nullcontext(files)


KIT = "qlora_kit"


def is_own(status: os.stat_result) -> bool:
    """Whether nobody else could have written a file or a directory."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def open_own(path: str | Path, folder: int | None = None) -> BinaryIO:
    """A file of ours, open for reading; its path may begin at an open `folder`.

    Errors: `OSError`; `ValueError` for another's, for a link or a pipe.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path}: is a link") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or not is_own(status):
        os.close(handle)
        raise ValueError(_not_own(path, "file", status))
    return open(handle, "rb")


def open_own_folder(path: str | Path, folder: int | None = None, *, link: bool = False) -> int:
    """A directory of ours, open, to open files in; a `link` that leads to one will do where given.

    Errors: `OSError`; `ValueError` for one that others may write to.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if link else os.O_NOFOLLOW)
    handle = os.open(path, flags, dir_fd=folder)
    status = os.fstat(handle)
    if not is_own(status):
        os.close(handle)
        raise ValueError(_not_own(path, "directory", status))
    return handle


def _not_own(path: str | Path, kind: str, status: os.stat_result) -> str:
    """What is wrong with a file or a directory that others could have written, and the remedy."""
    orders = []
    if status.st_uid != os.geteuid():
        orders.append(f"chown {os.geteuid()} {shlex.quote(str(path))}")
    if status.st_mode & 0o022:
        orders.append(f"chmod go-w {shlex.quote(str(path))}")
    remedy = f": {', '.join(orders)}" if orders else ""
    return f"{path}: is not a {kind} of this user alone{remedy}"


def kept_in(name: str) -> Path | None:
    """The user's directory for what is kept under a name; None for a user without a home."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    # The standard of XDG has a relative one ignored; `~` stays where nobody's home is known.
    return Path(home) / KIT / name if os.path.isabs(home) else None

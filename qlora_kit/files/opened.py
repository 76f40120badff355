"""Files that are opened once, however often something is read from them."""

from __future__ import annotations

import contextlib
import io
from contextlib import AbstractContextManager
from pathlib import Path

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

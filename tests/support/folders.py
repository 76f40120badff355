"""What lies in a folder, and what may come while it is written."""

from __future__ import annotations

from pathlib import Path


class Stop(BaseException):
    """Neither an `Exception` nor foreseen, like a signal."""


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, and what a file holds."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }

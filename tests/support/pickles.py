"""A pickle that leaves a file behind if anything opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Payload:
    """Unpickled, it makes an empty file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))

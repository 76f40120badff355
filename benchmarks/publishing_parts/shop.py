"""Commands in forked processes, volumes, the list of cases, and what is said of each of them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.commands.main import main as command

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACE, PRIVATE, BIND, READ_ONLY, REMOUNT, DETACH = 0x20000, 0x44000, 0x1000, 1, 32, 2
NOBODY = 65534
CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink", "link", "symlink")


@dataclass
class Shop:
    """A base, an adapter on it and rows, and a folder for each case."""

    root: Path
    namespace: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def export(self, place: Path | str, *more: object, dtype: str = "bf16") -> list[str]:
        """The arguments of an export to `place`."""
        known = ("--adapter", self.root / "adapter", "--model", self.root / "base")
        verify = ("--verify", self.root / "rows.jsonl", "--dtype", dtype)
        return [str(one) for one in ("export", *known, *verify, "--output_dir", place, *more)]

    def page(self, place: Path, data: Path) -> list[str]:
        """The arguments of show-data with a page."""
        known = ("--model", self.root / "base", "--data", data, "--token_cache", "none")
        return [str(one) for one in ("show-data", *known, "--html", place)]


def run(
    arguments: list[str],
    *,
    user: int = 0,
    folder: Path | None = None,
    home: str | None = "/nowhere",
    kill_after: int = 0,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """A command in a forked process: its exit code (or minus the signal), and its last line.

    `kill_after` ends it after so many calls that change a directory; `meanwhile` is called in it
    once the first file of an export is written.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            code = 99
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                if folder is not None:
                    os.chdir(folder)
                os.environ.pop("XDG_CACHE_HOME", None)
                os.environ.pop("HOME", None)
                if home is not None:
                    os.environ["HOME"] = home
                if user:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                _watch(kill_after, meanwhile)
                code = command(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        said.seek(0)
        lines = said.read().splitlines() or [""]
    return status, lines[-1]


def _watch(kill_after: int, meanwhile: Callable[[], None] | None) -> None:
    """Count the calls that change a directory, from inside the process."""
    seen = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            here = seen
            try:
                return call(*arguments, **options)
            finally:
                if here == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if meanwhile is not None and str(arguments[-1]).endswith("model.safetensors"):
                    meanwhile()

        return wrapped

    if kill_after or meanwhile:
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))


def tree(folder: Path) -> dict[str, str]:
    """What is below a folder: the hash of each file; a lock that nobody holds says nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def mounted(place: Path, kind: bytes = b"tmpfs", options: bytes = b"size=16m") -> Iterator[Path]:
    """A volume at `place`."""
    place.mkdir(exist_ok=True)
    if LIBC.mount(kind, os.fsencode(place), kind, 0, options):
        raise OSError(ctypes.get_errno(), f"mount {place}")
    try:
        yield place
    finally:
        LIBC.umount2(os.fsencode(place), DETACH)


Case = Callable[[Shop, Path], tuple[bool, str]]
CASES: dict[str, tuple[str, bool, Case]] = {}
"""A name to its area, whether it needs a mount namespace, and what tries it."""


def case(area: str, name: str, mounts: bool = False) -> Callable[[Case], Case]:
    """Put a case on the list."""

    def add(tried: Case) -> Case:
        CASES[name] = (area, mounts, tried)
        return tried

    return add


def refused(
    arguments: list[str], watched: Path, code: int, words: str, **how: Any
) -> tuple[bool, str]:
    """Whether a command is refused with these words, and nothing changes below `watched`."""
    before = tree(watched)
    found, line = run(arguments, **how)
    return (found == code and words in line and tree(watched) == before), f"exit {found}: {line}"


def works(arguments: list[str], place: Path, **how: Any) -> tuple[bool, str]:
    """Whether an export works, and there is nothing beside it."""
    known = set(os.listdir(place.parent)) | {place.name}
    code, line = run(arguments, **how)
    left = set(os.listdir(place.parent)) - known
    left |= {name for name in os.listdir(place) if name.startswith(".")} if place.is_dir() else left
    whole = (place / "export.json").is_file() and (place / "model.safetensors").is_file()
    return code == 0 and whole and not left, f"exit {code}: {line} {sorted(left) or ''}"

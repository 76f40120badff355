"""Exports that are killed: at any of their writes and changes of a directory, or at any moment.

A process that has imported everything forks for each export. In the child the calls through which
files come and go are counted (those of `os`, and the writes of Python's files). At the chosen one
the child is killed before it, after it, or with half of it written. A kill leaves the disk as it
is then: so that all of the calls can be gone through in one export, the folder can be copied at
each of them instead. Or a timer of the kernel ends the child after so many seconds of the
processor, wherever it is, in compiled code as well.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Answer, Forks

from qlora_kit.config.export import FORMATS, GOES_WITH
from qlora_kit.files.publish import mend

BEFORE = """
import contextlib, io, sys
sys.path[:0] = {paths}
import export_kills
from qlora_kit.commands import main as module
for command in {warm}:
    with contextlib.redirect_stdout(io.StringIO()):
        assert module.main(command) == 0
module.main = export_kills.killed(module.main)
"""
CALLS = ("open", "write", "pwrite", "fsync", "ftruncate")
CALLS = (*CALLS, "rename", "replace", "mkdir", "unlink", "rmdir", "link", "symlink")
HOW = ("before", "inside", "after")
ENDED = {-signal.SIGKILL, -signal.SIGPROF}


@dataclass
class Exports:
    """A base, an adapter on it and rows, and exports of them in any format, into `.../out`."""

    root: Path
    formats: Sequence[str] = FORMATS

    def __post_init__(self) -> None:
        here = Path(__file__).resolve().parent
        paths = [str(here.parent), str(here)]
        ages = ("old", "new")
        warm = [
            self.command(form, self.made(form, age), age) for form in self.formats for age in ages
        ]
        self._forks = Forks(self.root, BEFORE.format(paths=paths, warm=warm))
        assert self._forks.run(self.root, "--version").code == 0  # it has made both of each

    def made(self, form: str, age: str) -> Path:
        """An export that nothing happened to: the `old` one or the `new` one."""
        return self.root / age / form / "out"

    def command(self, form: str, place: Path, age: str = "new") -> list[str]:
        """The arguments of an export; an old one has other bytes."""
        known = ["export", "--adapter", self.root / "adapter", "--format", form]
        more = ["--base_name", f"owner/{age}", "--output_dir", place]
        if form != "adapter":
            more += ["--model", self.root / "base"]
        if form in GOES_WITH["verify"]:
            more += ["--verify", self.root / "rows.jsonl"]
        return [str(one) for one in (*known, *more)]

    def put_old(self, form: str, place: Path) -> None:
        """Let the old export be what is at a place."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.made(form, "old"), place)

    def run(self, form: str, place: Path, **variables: str) -> Answer:
        """Export over what is at a place, in a process of its own."""
        return self._forks.run(self.root, *self.command(form, place), "--overwrite", **variables)

    def killed(self, form: str, place: Path, at: int, how: str) -> Answer:
        """An export that is killed at a call, counted from 1; one of fewer calls ends well."""
        return self.run(form, place, KILL_AT=str(at), KILL_HOW=how)

    def ended(self, form: str, place: Path, seconds: float) -> Answer:
        """An export that is ended after so many seconds of the processor."""
        return self.run(form, place, END_AFTER=str(seconds))

    def copied(self, form: str, place: Path, into: Path) -> list[str]:
        """Export once, and copy the folder around the place as it is before each call.

        Of a write also with half of it written. A state that is the last one is not copied again.
        Returns the names of the calls.
        """
        answer = self.run(form, place, COPY=str(place.parent), COPY_INTO=str(into))
        assert answer.code == 0, answer.err
        return (into / "calls").read_text().split()

    def found(self, form: str, place: Path) -> str:
        """Which export is at a place once the next one has looked: `old`, `new` or what is wrong.

        Beside it nothing is left.
        """
        mend(place)
        left = {name for name in os.listdir(place.parent) if name.startswith(".")}
        now = tree(place)
        for name in ("old", "new"):
            if now == tree(self.made(form, name)):
                return name if not left else f"{name}, and {sorted(left)} is left"
        return f"neither is whole: {sorted(now)}"

    def close(self) -> None:
        """End the process."""
        self._forks.close()


def tree(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder; a lock that nobody holds says nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def killed(main: Any) -> Any:
    """`main`, with what the environment asks for happening to this process meanwhile."""

    def wrapped(arguments: list[str]) -> int:
        if seconds := os.environ.get("END_AFTER"):
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, float(seconds))
        counter = _Counter()
        counter.watch()
        code: int = main(arguments)
        counter.end()
        return code

    return wrapped


class _Counter:
    """Counts the calls that change the disk, and kills this process or copies a folder at them."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._at = int(os.environ.get("KILL_AT", 0))
        self._how = os.environ.get("KILL_HOW", "before")
        self._copied, self._into = (Path(os.environ.get(n, "")) for n in ("COPY", "COPY_INTO"))
        self._is_copying, self._is_watching, self._state = "COPY" in os.environ, True, ""

    def end(self) -> None:
        """Tell which calls there were."""
        self._is_watching = False
        if self._is_copying:
            (self._into / "calls").write_text(" ".join(self._made))

    def watch(self) -> None:
        """Stand around every such call of this process."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        plain, counter = io.open, self

        class Written(io.BufferedWriter):
            def write(self, content: Any) -> int:
                if not counter._is_watching:
                    return super().write(content)
                return counter.strike("file.write", super().write, self.flush, content)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any
        ) -> Any:
            if not self._is_watching or not set(mode) & set("wax+"):
                return plain(file, mode, buffering, *more, **options)
            made = self.strike("open", plain, None, file, mode, buffering, *more, **options)
            if "b" not in mode or "+" in mode or not isinstance(made, io.BufferedWriter):
                return made
            return Written(made.detach())

        io.open = builtins.open = opened  # type: ignore[assignment]

    def _counted(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._is_watching:
                return real(*arguments, **options)
            reads = name == "open" and not arguments[1] & os.O_CREAT
            said = name in ("write", "fsync") and arguments[0] <= 2
            if reads or said:
                return real(*arguments, **options)
            return self.strike(name, real, None, *arguments, **options)

        return call

    def strike(self, name: str, real: Any, flush: Any, *arguments: Any, **options: Any) -> Any:
        """Make a call, unless it is the one at which this process is killed."""
        if self._is_copying:
            return self._copy_around(name, real, flush, *arguments, **options)
        self._made.append(name)
        if len(self._made) != self._at:
            return real(*arguments, **options)
        if self._how == "inside" and name.endswith("write"):
            *where, content = arguments
            real(*where, _half(content))
        elif self._how == "after":
            real(*arguments, **options)
        if flush is not None:
            flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    def _copy_around(
        self, name: str, real: Any, flush: Any, *arguments: Any, **options: Any
    ) -> Any:
        self._made.append(name)
        self._copy("before")
        if name not in ("write", "file.write"):
            return real(*arguments, **options)
        *where, content = arguments
        half = _half(content)
        written = real(*where, half)
        if flush is not None:
            flush()
        self._copy("inside")
        return written + real(*where, memoryview(content).cast("B")[written:])

    def _copy(self, how: str) -> None:
        """Copy the folder, unless it is as it was."""
        self._is_watching = False
        found = sorted(self._copied.rglob("*"))
        known = [(path, path.lstat()) for path in found]
        kept = [(str(path), status.st_size, status.st_mtime_ns) for path, status in known]
        if (state := repr(kept)) != self._state:
            self._state = state
            target = self._into / f"{len(self._made):05}-{how}"
            shutil.copytree(self._copied, target, symlinks=True)
        self._is_watching = True


def _half(content: Any) -> bytes:
    view = memoryview(content).cast("B")
    return bytes(view[: len(view) // 2])

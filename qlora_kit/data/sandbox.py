"""Chat templates run in a process of their own, with limits on time, memory and what they write.

A template is a program out of a file, and what it can be made to do by numbers, widths, formats,
bytes or nested values has no end that could be listed. So the system holds it: `template_worker.py`
runs it in Jinja's immutable sandbox in a second process, which is killed once it has used its
time of the processor, also inside of one long operation, and gets no more memory than its limit.
The process starts with the first template, serves all others, and ends with this one.

Sources: transformers' `chat_template_utils.py` (5.x); Jinja 3.1, "Sandbox"; setitimer(2).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from qlora_kit.errors import DataError, ResourceError, TokenizerError, UnsafeInputError

TIME_LIMIT_S = 3.0
"""Of the processor, for one rendering; a second more for each million characters of messages."""

SIZE_LIMIT = 1024**2
"""Characters of a template, and of what it writes beyond ten times its input's."""

MEMORY_LIMIT = 640 * 1024**2
"""Bytes of the process's address space, beyond 64 for each character of the messages."""

OPEN, CLOSE, LITERAL = "\ue000", "\ue001", "\ue002"
"""Marks around generated text, and around the numbers that stand for control tokens in messages.

Private characters; `mask.py` hides those that a message holds itself.
"""

PACKAGE = str(Path(__file__).resolve().parents[2])
"""Where this package is: hooks that find it elsewhere are not in the other process."""

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
START += "from qlora_kit.data.template_worker import serve; serve()"


def today() -> str:
    """This day, as templates are told it: 2026-01-31."""
    return datetime.now().date().isoformat()


def render(
    template: str,
    where: str,
    variables: Mapping[str, Any],
    input_size: int,
    date: str | None = None,
) -> str:
    """What a template writes; `input_size` is the number of characters in its messages.

    `date` is what the template gets for now: the midnight at which that day begins; None: today.

    Errors: `UnsafeInputError` beyond the limits or out of the sandbox, `DataError` where the
    template refuses the messages, `TokenizerError` where it is no template.
    """
    asked: dict[str, Any] = {"do": "render", "variables": variables, "date": date or today()}
    asked["size"] = 10 * input_size + SIZE_LIMIT
    return str(_ask(template, where, asked, input_size))


def check_template(template: str, where: str) -> None:
    """Refuse a text that is no template. Errors: `TokenizerError`, `UnsafeInputError`."""
    try:
        _described(template)
    except _RefusedError as error:
        raise error.of(where) from error


def literal_text(template: str) -> str:
    """Everything that a template itself can write, the pieces apart."""
    return str(_described(template)["literal"])


def variables_of(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself everywhere."""
    return frozenset(_described(template)["variables"])


@functools.lru_cache(maxsize=64)
def _described(template: str) -> dict[str, Any]:
    return dict(_asked(template, {"do": "describe"}, 0))


def _ask(template: str, where: str, asked: dict[str, Any], input_size: int) -> Any:
    try:
        return _asked(template, asked, input_size)
    except _RefusedError as error:
        raise error.of(where) from error


class _RefusedError(Exception):
    """What the worker says of a template that it did not run to its end."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def of(self, where: str) -> Exception:
        """Ours, for the place `where` a template was used."""
        if self.kind == "syntax":
            return TokenizerError(
                f"{where}: the chat template is no Jinja template: {self}",
                "correct it, or use another (--chat_template)",
            )
        if self.kind == "refused":
            return DataError(
                f"{where}: the chat template refuses the messages: {self}",
                "give the order and the roles that the model was made for",
            )
        return UnsafeInputError(
            f"{where}: the chat template was stopped: {self}",
            "use another template (--chat_template)",
        )


class _Worker:
    """The other process, and the templates that it has been sent."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._known: dict[str, int] = {}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", START, json.dumps([PACKAGE, *sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Signals of the terminal are for the command: it ends this process with itself.
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(
                f"no process for the chat template can be started: {error.strerror}",
                "end other processes, or raise the limit on them (ulimit -u)",
            ) from error

    def ask(self, template: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process ended before it gave one."""
        new = template not in self._known
        number = self._known.setdefault(template, len(self._known))
        asked = {**asked, "number": number, "template": template if new else None}
        try:
            content = json.dumps(asked).encode()
        except RecursionError as error:
            raise _RefusedError("stopped", "the messages are nested too deeply") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(struct.pack(">Q", len(content)) + content)
            self._process.stdin.flush()
            size = _read(self._process.stdout, 8)
            answer = _read(self._process.stdout, *struct.unpack(">Q", size)) if size else b""
        except BrokenPipeError:
            return None
        except BaseException:
            # Interrupted: what the process answers would be taken for the next answer.
            self.end()
            raise
        return json.loads(answer) if answer else None

    def end(self) -> int:
        """Stop the process; how it ended."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code

    def code(self) -> int:
        """How a process ended that has closed its pipe."""
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return self.end()


_lock = threading.Lock()
_worker: _Worker | None = None


def _asked(template: str, asked: dict[str, Any], input_size: int) -> Any:
    """The worker's answer. Errors: `_RefusedError`, `ResourceError`."""
    global _worker
    seconds = TIME_LIMIT_S + input_size / 1e6
    asked |= {"seconds": seconds, "memory": MEMORY_LIMIT + 64 * input_size}
    with _lock:
        for _ in range(3):
            # A forked process must not talk to its parent's worker.
            if _worker is None or _worker.owner != os.getpid():
                _worker = _Worker()
            answer = _worker.ask(template, asked)
            if answer is not None:
                break
            code, _worker = _worker.code(), None
            if code == -signal.SIGPROF:
                raise _RefusedError("stopped", f"it ran longer than {seconds:.3g} s")
            if code != 0:
                raise _RefusedError("stopped", "it takes more memory than a template may have")
            # It had nothing to do for a while, and ended: another one is asked.
        else:
            raise ResourceError(
                "the process for the chat template ends at once",
                "free some memory, or raise the limits on it (ulimit)",
            )
    if "kind" in answer:
        raise _RefusedError(answer["kind"], answer["message"])
    return answer["result"]


def _read(pipe: IO[bytes], size: int) -> bytes:
    """So many bytes, or none where the other end has closed."""
    content = pipe.read(size)
    return content if len(content) == size else b""


@atexit.register
def _end() -> None:
    global _worker
    if _worker is not None and _worker.owner == os.getpid():
        _worker.end()
    _worker = None

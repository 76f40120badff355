"""A second process that answers questions, each within limits on time and memory.

Some work on what comes out of a file has no bound that could be checked before it is done: a chat
template is a program, and a regex may try ever more ways to match. So the system bounds it: the
question goes to a process that is killed once it has used its time of the processor, also inside
of one long operation, and gets no more address space than its limit.

The process starts with the first question, answers all others, ends with this one or after a
minute without a question, and is started again where it was killed. Questions and answers are
JSON, each after its length in eight bytes. Source: setitimer(2), getrlimit(2).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

IDLE_S = 60.0
"""Without a question the process ends: a run encodes its rows once, and then trains for hours."""

ATTEMPTS = 3
"""Processes that are started for one question, where each ends before it has read it."""

PACKAGE = str(Path(__file__).resolve().parents[2])
"""Where this package is: hooks that find it elsewhere are not in the other process."""

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
START += "from qlora_kit.process.worker import serve; serve(sys.argv[2])"


class TimeLimitError(Exception):
    """A question took more seconds of the processor than it may."""


class MemoryLimitError(Exception):
    """A question took more address space than it may."""


class Worker:
    """The other process; `target` is the function, as module:name, that answers there.

    The function takes and gives what JSON holds, and raises nothing but for want of memory.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.end)

    def ask(self, question: Any, *, seconds: float, memory: int) -> Any:
        """The answer, found in so many seconds of the processor and bytes of address space.

        Errors: `TimeLimitError`, `MemoryLimitError`, `RecursionError` for a question nested too
        deeply, `OSError` where no process can be started, `ChildProcessError` where each ends.
        """
        content = json.dumps([seconds, memory, question]).encode()
        with self._lock:
            for _ in range(ATTEMPTS):
                reply = self._exchange(content)
                if reply is not None:
                    break
                code = self._ended()
                if code != 0:
                    raise TimeLimitError if code == -signal.SIGPROF else MemoryLimitError
                # It had nothing to do for a while, and ended: another one is asked.
            else:
                raise ChildProcessError
        if not reply:
            raise MemoryLimitError
        return reply[0]

    def end(self) -> None:
        """Stop the process, where this one started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._ended()

    def _exchange(self, content: bytes) -> list[Any] | None:
        """What the process says, or None where it ended before it said anything."""
        # A forked process must not talk to its parent's worker.
        if self._process is None or self._owner != os.getpid():
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, content)
            reply = receive(self._process.stdout)
        except BrokenPipeError:
            return None
        except BaseException:
            # Interrupted: what the process answers would be taken for the next answer.
            self.end()
            raise
        return json.loads(reply) if reply else None

    def _start(self) -> None:
        path = json.dumps([PACKAGE, *sys.path])
        self._process, self._owner = None, os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", START, path, self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Signals of the terminal are for the command: it ends this process with itself.
            start_new_session=True,
        )

    def _ended(self) -> int:
        """How the process ended, which has closed its pipe or was killed."""
        assert self._process is not None
        process, self._process = self._process, None
        # Leaving closes the pipes, of which one may hold what could not be written.
        with contextlib.suppress(OSError), process:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()


def serve(target: str) -> None:
    """Answer questions until the other process goes, or asks nothing for a while."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while select.select([source], [], [], IDLE_S)[0]:
        content = receive(source)
        if not content:
            return
        try:
            seconds, memory, question = json.loads(content)
            _limit(seconds, memory)
            reply = [function(question)]
        except (MemoryError, SystemError):  # the latter where C has no memory
            reply = []
        _limit(0, resource.RLIM_INFINITY)
        send(sink, json.dumps(reply).encode())


def _limit(seconds: float, memory: int) -> None:
    """Let this process live so long, of the processor's time, and have so much address space."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    # Without a limit it is -1.
    soft = min((limit for limit in (memory, hard) if limit != resource.RLIM_INFINITY), default=hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def send(pipe: IO[bytes], content: bytes) -> None:
    """Write a message, which the other end reads as a whole."""
    pipe.write(struct.pack(">Q", len(content)) + content)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """The message that was written, or nothing where the other end has closed."""
    size = pipe.read(8)
    return pipe.read(*struct.unpack(">Q", size)) if len(size) == 8 else b""

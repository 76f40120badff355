"""Signals that ask a command to stop: it saves what is worth it, and leaves.

`StopSignals` turns them into `Stopped`: at once where nothing is at stake, and inside
`between_steps` only where it leaves whole steps. A step ends first; one that takes longer than the
grace is left in the middle of its gradients, which are then dropped. ^C does not wait for a step,
only for the micro-batch that is under way. A second signal leaves whatever can be left at once; a
save that has begun is let end, unless the same signal comes again later than a second after it.

While something is imported nothing is raised: an exception in the middle of torch's import ends in
an abort of the process. It is raised when the import is over, some hundredths of a second later.

A signal that is ignored, as `nohup` ignores SIGHUP, stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import ClassVar, NoReturn

SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    # What schedulers send before they kill, and the kernel at the limit of CPU time.
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
GRACE_S = 20.0
"""How long a step may go on after a signal; schedulers often kill after 30 s."""
POLL_S = 0.05
"""How often it is looked whether an import is over."""
IMPATIENT_S = 1.0
"""A signal so soon after another one is the same request."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop; like ^C, it passes every `except Exception`."""

    def __init__(
        self,
        signal_number: int,
        problem: str = "nothing more was written",
        remedy: str = "run the command again",
    ) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.problem = f"stopped by {signal.Signals(signal_number).name}: {problem}"
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class StopSignals:
    """The signals while a command runs; inside another one's context it is that other one."""

    _active: ClassVar[StopSignals | None] = None

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._deferred = self._droppable = self._at_once = self._overdue = False
        self._last_s = 0.0
        self._outermost: FrameType | None = None
        self._before: dict[int, object] = {}
        self._says: str | None = None
        self.received: int | None = None
        """The signal that came, if one did."""

    def __enter__(self) -> StopSignals:
        if StopSignals._active is not None:
            return StopSignals._active
        if threading.current_thread() is threading.main_thread():
            StopSignals._active, self._outermost = self, sys._getframe(1)
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._on_signal)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *exception: object) -> None:
        if StopSignals._active is self:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            StopSignals._active = self._outermost = None

    @contextlib.contextmanager
    def between_steps(self, says: str | None = None) -> Iterator[None]:
        """Inside, a signal waits for `raise_if_received` or for a droppable part.

        It is answered with the line `says`, where what is waited for is not a step.
        """
        self.raise_if_received()
        self._deferred, self._says = True, says
        try:
            yield
        finally:
            self._deferred = False
            self._no_timer()

    @contextlib.contextmanager
    def droppable(self, *, at_once: bool = False) -> Iterator[None]:
        """Inside, nothing is lost by stopping once the grace is over, or `at_once`."""
        self._droppable, self._at_once = True, at_once
        try:
            if self._overdue or (at_once and self.received is not None):
                self._stop()
            yield
        finally:
            self._droppable = self._at_once = False

    def raise_if_received(self) -> None:
        """Stop here if a signal came. Errors: `Stopped`."""
        if self.received is not None:
            self._stop()

    def forget(self) -> None:
        """Where a signal was answered otherwise than by leaving: the next is the first again."""
        self._no_timer()
        self.received, self._overdue, self._last_s = None, False, 0.0

    def between_micro_batches(self) -> None:
        """Stop here if it is ^C that came, or anything twice. Errors: `Stopped`."""
        if self.received == signal.SIGINT or self._overdue:
            self.raise_if_received()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self.received is None
        soon, self._last_s = now - self._last_s < IMPATIENT_S, now
        if first:
            self.received = number
            if not self._deferred or self._at_once:
                self._stop_after_import(frame)
                return
            what = "micro-batch" if number == signal.SIGINT else "step"
            _say(self._says or f"stopping after this {what}")
            signal.setitimer(signal.ITIMER_REAL, self._grace_s, POLL_S)
        elif number == signal.SIGXCPU:
            pass  # the kernel repeats it with every second of CPU time
        elif self._droppable:
            self._overdue = True
            self._stop_after_import(frame)
        elif soon or number != self.received:
            self._overdue = True
        else:
            # Whatever is being written is written aside: leaving now harms nothing.
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
            _say("error: stopped at once by a second signal; run the command again")
            os._exit(128 + number)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self._at_once:
            self._stop_after_import(frame)
            return
        self._overdue = True
        if self._droppable:
            self._stop_after_import(frame)

    def _stop_after_import(self, frame: FrameType | None) -> None:
        """Stop now, or look again soon where an exception would be lost or do harm."""
        while frame is not None and frame is not self._outermost:
            code = frame.f_code
            # What a destructor raises is printed and forgotten.
            if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__":
                signal.setitimer(signal.ITIMER_REAL, POLL_S, POLL_S)
                return
            frame = frame.f_back
        self._stop()

    def _stop(self) -> NoReturn:
        self._no_timer()
        self._droppable = self._at_once = False
        assert self.received is not None
        raise Stopped(self.received)

    def _no_timer(self) -> None:
        if StopSignals._active is self:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _say(line: str) -> None:
    """A line on stderr at once, past what Python holds back; a bar on the terminal's line goes."""
    with contextlib.suppress(OSError):
        os.write(2, (("\r\x1b[K" if os.isatty(2) else "") + line + "\n").encode())

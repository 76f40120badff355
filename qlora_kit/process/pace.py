"""Work that leaves most of the time to the other threads of its process.

Python runs one thread at a time, and a thread that decodes gives the interpreter away with every
operation of torch: one that works in Python beside it takes it up to 5 ms each time. So such work
is done in pieces with rests between them, as long as others work. Whether they do, the rests show:
what processor time the process takes while the own thread sleeps.
"""

from __future__ import annotations

import time

SHARE = 0.15
"""Of the time, for the own thread."""
LOOK_S = 0.02
"""The shortest rest. The system counts processor time by its clock, of 4 to 10 ms."""
SETTLE_S = 0.005
"""Of it, in which torch's own threads, after an operation by several, still wait actively."""
WORKING = 0.1
"""Of a rest, that others were running for if they work."""
AGAIN_S = 1.0
"""After which that is looked at again, where nobody did."""


class Pace:
    """Is called between small pieces of work, all by one thread at a time."""

    def __init__(self) -> None:
        self.others_work = False
        """What the last rest showed."""
        self._looked = -AGAIN_S
        self._began = self._last = time.perf_counter()
        self._worked = 0.0
        self.begin()

    def begin(self) -> None:
        """A piece of work begins."""
        self._last = time.perf_counter()
        # A long time without work is no reason to take all of it now.
        self._began = max(self._began, self._last - self._worked / SHARE)

    def __call__(self) -> None:
        """Rest, if it is time to."""
        # Not processor time: a thread that is held up by the system holds the interpreter too.
        now = time.perf_counter()
        self._worked += now - self._last
        self._last = now
        seconds = self._worked / SHARE - (now - self._began)
        if seconds >= LOOK_S and self.others_work:
            self._rest(seconds)
        elif seconds >= LOOK_S and now - self._looked > AGAIN_S:
            self._rest(LOOK_S)
            # What was done while nobody else worked takes nothing from them.
            self._began, self._worked = self._last, 0.0

    def _rest(self, seconds: float) -> None:
        time.sleep(SETTLE_S)
        seconds -= SETTLE_S
        before, began = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        self._last = self._looked = time.perf_counter()
        others = time.process_time() - before
        self.others_work = others > WORKING * (self._last - began)

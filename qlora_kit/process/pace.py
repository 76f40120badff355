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
PIECE_S = 0.002
"""Of the own thread's processor time, between two rests."""
LOOK_S = 0.01
"""Of a rest that is taken to see whether others work: the system counts their time by its clock."""
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
        self.begin()

    def begin(self) -> None:
        """A piece of work begins, or the thread is another one."""
        self._began, self._own = time.perf_counter(), time.thread_time()
        self._last = self._own

    def __call__(self) -> None:
        """Rest, if it is time to."""
        own, now = time.thread_time(), time.perf_counter()
        if own - self._last < PIECE_S:
            return
        self._last = own
        if self.others_work:
            self._rest((own - self._own) / SHARE - (now - self._began))
        elif now - self._looked > AGAIN_S:
            self._rest(LOOK_S)

    def _rest(self, seconds: float) -> None:
        if seconds < LOOK_S:
            return  # the next one will be longer
        before, began = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        self._looked = time.perf_counter()
        others = time.process_time() - before
        self.others_work = others > WORKING * (self._looked - began)

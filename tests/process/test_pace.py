"""Laws of work beside other threads: it takes its share of the time, where they work."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_kit.process.pace import LOOK_S, PIECE_S, SHARE, Pace

PIECE = bytes(10_000)


@contextmanager
def others() -> Iterator[None]:
    """Threads that work as torch does: without the interpreter."""
    done, large = threading.Event(), bytes(2_000_000)

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(large)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def work(pace: Pace, seconds: float) -> tuple[float, float]:
    """So much processor time of work in pieces; what it took of that, and of the time."""
    began, own = time.perf_counter(), time.thread_time()
    pace.begin()
    while time.thread_time() - own < seconds:
        hashlib.sha256(PIECE)
        pace()
    return time.thread_time() - own, time.perf_counter() - began


def test_beside_others_the_own_thread_takes_its_share() -> None:
    pace = Pace()
    with others():
        work(pace, 0.02)
        assert pace.others_work
        own, took = work(pace, 0.06)
    # What the last rest left over, and the piece after it.
    assert own <= SHARE * (took + LOOK_S) + 2 * PIECE_S


def test_alone_there_is_nobody_to_leave_time_to() -> None:
    pace = Pace()
    with others():
        work(pace, 0.02)
    work(pace, 0.02)
    assert not pace.others_work

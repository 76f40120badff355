"""Laws of work beside other threads: it takes its share of the time, where they work."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qlora_kit.process import pace as pace_module
from qlora_kit.process.pace import LOOK_S, SHARE, Pace

PIECE, PIECE_S = bytes(10_000), 0.002


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


def work(pace: Pace, pieces: int) -> tuple[float, float]:
    """Some pieces of work of 2 ms each; how long all of them took, and how long with the rests.

    Each time is begun anew after three, as adapters are added one after another.
    """
    began, worked = time.perf_counter(), 0.0
    for number in range(pieces):
        if number % 3 == 0:
            pace.begin()
        piece = time.perf_counter()
        while time.perf_counter() - piece < PIECE_S:
            hashlib.sha256(PIECE)
        worked += time.perf_counter() - piece
        pace()
    return worked, time.perf_counter() - began


def test_beside_others_the_own_thread_takes_its_share() -> None:
    pace = Pace()
    with others():
        work(pace, 4)
        assert pace.others_work
        worked, took = work(pace, 12)
    # The last rest is still to come where it would be shorter than the shortest.
    assert worked <= SHARE * (took + LOOK_S)


def test_threads_that_wait_actively_for_a_moment_are_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As OpenMP's after an operation by several: a clock on which they do for 4 ms of each rest."""

    class Clock:
        now = used = 0.0

        def perf_counter(self) -> float:
            return self.now

        def process_time(self) -> float:
            return self.used

        def sleep(self, seconds: float) -> None:
            self.now += seconds
            self.used += max(0.0, min(seconds, spinning[0]))
            spinning[0] -= seconds

    spinning, clock = [0.0], Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    pace = Pace()
    for _ in range(100):
        clock.now += 0.1
        spinning[0] = 0.004
        pace()
        assert not pace.others_work


def test_alone_there_is_nobody_to_leave_time_to() -> None:
    pace = Pace()
    with others():
        work(pace, 4)
    work(pace, 4)
    assert not pace.others_work

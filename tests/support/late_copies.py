"""Copies between device and host that are made as late as they may be, without a device.

A stream of a card makes a copy at some time between the call and the end of whatever waits for it.
These are made when something waits. So a wait that is missing shows in the values: what was to be
filled has not been; and memory that was given up or written to too early shows in what is copied.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager

from torch import Tensor

from qlora_kit.device.transfer import Wait


class Late:
    """As `transfer.Copies`; in their order, as a stream. `most` were on their way at once."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.made = self.follows = self.most = 0

    def follow(self) -> None:
        self.follows += 1

    def copy(self, into: Tensor, source: Tensor) -> None:
        self.waiting.append((into, source))
        self.most = max(self.most, len(self.waiting))

    def ended(self) -> Wait:
        until = self.made + len(self.waiting)

        def wait() -> None:
            while self.made < until:
                into, source = self.waiting.popleft()
                into.copy_(source)
                self.made += 1

        return wait

    def inside(self) -> AbstractContextManager[object]:
        raise NotImplementedError  # what a thread copies by itself is not seen here

"""Host memory that files are read into on their way to a device.

Two pieces take turns: while the device copies from the one, the next bytes are read into the other.
On CUDA they are page-locked, without which a copy is made in the calling thread. Copies go through
the current stream, in which everything else follows them, so that nobody waits for them but the
piece that they come from.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.device.target import has_own_memory

POPULATE_WRITE = 23
"""Linux's `MADV_POPULATE_WRITE`, since 5.14; Python's `mmap` does not name it."""
Wait = Callable[[], None]
"""Returns when a copy has arrived."""


class HostBuffers:
    """Two pieces of `nbytes` bytes each, for copies to `device`.

    A piece is handed out again only after the copy from it has arrived. `recorded`, called after a
    copy was queued, gives what waits for it.
    """

    def __init__(
        self, nbytes: int, device: torch.device, recorded: Callable[[], Wait] | None = None
    ) -> None:
        self._recorded = recorded or (lambda: _queued(device))
        locked = has_own_memory(device)
        pieces = (torch.empty(nbytes, dtype=torch.uint8, pin_memory=locked) for _ in range(2))
        self._turns: deque[tuple[Tensor, Wait]] = deque((piece, _arrived) for piece in pieces)

    def take(self) -> Tensor:
        """The piece whose turn it is, uint8 (nbytes,), to be filled and copied from."""
        piece, wait = self._turns[0]
        wait()
        return piece

    def sent(self) -> None:
        """The copy from the piece that was taken is queued: it is the other one's turn."""
        piece, _ = self._turns.popleft()
        self._turns.append((piece, self._recorded()))


def give_pages(memory: Tensor) -> None:
    """Have the kernel give the pages of new memory of the host at once; numbers in it stay.

    Else each comes with a fault of its own when it is written first: an eighth of the processor's
    time of reading and hashing 3.6 GiB. Where the kernel does not know how, they come so.
    """
    if sys.platform != "linux":
        return
    first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if nbytes > 0:
        sized = ctypes.c_void_p(first), ctypes.c_size_t(nbytes)
        ctypes.CDLL(None).madvise(*sized, POPULATE_WRITE)


def _queued(device: torch.device) -> Wait:
    """What waits for all that the current stream of a device has to do now."""
    if not has_own_memory(device):
        return _arrived
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize  # type: ignore[no-any-return]


def _arrived() -> None:
    """Of a copy that is done when the call returns."""

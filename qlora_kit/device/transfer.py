"""Tensors to the host's memory and back, beside the computation.

    held = transfers.out(tensor)      # its copy to the host begins
    transfers.prefetch(held)          # the copy back begins
    tensor = transfers.back(held)     # whatever is computed from here on finds it there

On CUDA copies have a stream of their own and nobody's host waits for them. What that takes:

  - A copy waits for what was computed before it was asked for: that made its tensor, or may still
    read the memory that it fills. What is computed waits for a copy where it needs its end.
  - A device tensor that is copied out is held until what is computed waits for that copy, which
    `settle` has it do: before the next ones are sent. One that is fetched and never asked for is
    given up in the same way. The allocator's own way, `Tensor.record_stream`, would keep such
    memory for as long as the host runs ahead of the device.
  - Host memory is page-locked, or a copy would make its caller wait. It comes in pieces of one
    size, a power of two, to which torch rounds it up in any case, and a piece is used again for
    any tensor. Its next copy comes after its last in the one stream. Where the system gives no
    such memory, ordinary memory does the same more slowly.

On the CPU device and host are one memory, and a copy is a plain copy. Fake tensors of a plan are
not copied: their host memory is made, and the bytes are told to whoever listens
(`device/target.py`) as the kernels `to_host` and `to_device`.

Backward may run in a thread of autograd's: nothing here belongs to a thread. Copies are in the
order in which they were asked for.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

from qlora_kit.device.target import (
    device_type,
    has_own_memory,
    has_values,
    set_inside,
    without_values,
)

TO_HOST, TO_DEVICE = "to_host", "to_device"
"""The kernels that a plan hears of, with the bytes moved as what they read."""
PIECE = 2**22
"""Bytes of a piece of page-locked memory: its copy takes longer than its launch."""

Wait = Callable[[], None]
"""Makes what is computed from here on wait for a copy."""
Context = Callable[[], contextlib.AbstractContextManager[None]]

_AROUND: ContextVar[Context] = ContextVar("around_host", default=contextlib.nullcontext)


def around_host(context: Context) -> AbstractContextManager[None]:
    """Inside, `context` is entered where host memory is made that tensors are sent to."""
    return set_inside(_AROUND, context)


def as_host_memory() -> AbstractContextManager[object]:
    """Inside, what is made is memory of the host that tensors are sent to."""
    return _AROUND.get()()


class Copies:
    """Where copies are made, one after another; here when they are asked for."""

    def follow(self) -> None:
        """The next copies come after all that has been computed so far."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy a tensor into another one like it, now or later."""
        into.copy_(source, non_blocking=True)

    def ended(self) -> Wait:
        """What waits for the copies so far."""
        return _arrived

    def inside(self) -> AbstractContextManager[object]:
        """Inside, what the calling thread copies by itself is one of them."""
        return contextlib.nullcontext()


class Held:
    """A tensor in the host's memory, like `like` but for the device, as bytes in `pieces`.

    `free` gets the pieces once it is gone.
    """

    def __init__(
        self,
        like: Tensor,
        device: torch.device,
        pieces: Sequence[Tensor],
        free: list[Tensor] | None = None,
    ) -> None:
        self.shape, self.stride, self.dtype = like.shape, like.stride(), like.dtype
        self.device = device
        self.pieces, self._free = pieces, free
        self._wait: Wait | None = None
        self.on_device: Tensor | None = None
        """What is copied from or to, until something waits for that."""
        self.is_coming = False

    def moving(self, tensor: Tensor, wait: Wait) -> None:
        """`tensor` of the device is copied, which `wait` waits for."""
        self.on_device, self._wait = tensor, wait

    def settle(self) -> Tensor | None:
        """Wait for a copy on its way; what it copied from or to, which is held no longer."""
        wait, self._wait = self._wait, None
        tensor, self.on_device, self.is_coming = self.on_device, None, False
        if wait is not None:
            wait()
        return tensor

    def __del__(self) -> None:
        # Its memory is used again by what is computed next, be it the end of a step or its failure.
        self.settle()
        if self._free is not None:
            self._free.extend(self.pieces)


class Transfers:
    """Copies between `device` and the host, in an order of their own.

    `copies` makes them: by itself a stream of the device's, or plain copies where it has none.
    """

    def __init__(self, device: torch.device, copies: Copies | None = None) -> None:
        self._locked = has_own_memory(device)
        self._copies = copies or copies_on(device)
        self._free: list[Tensor] = []
        self._leaving: list[weakref.ref[Held]] = []

    def out(self, tensor: Tensor) -> Held:
        """`tensor` on its way to the host; it may be dropped and may not be written to."""
        tensor = tensor.detach()
        if not _in_order(tensor).is_contiguous():  # it has gaps
            tensor = tensor.contiguous()
        host = self._pieces(tensor)
        held = Held(tensor, tensor.device, host, self._free if self._locked else None)
        if is_planned(tensor):
            without_values(TO_HOST, (tensor,), ())
            held.moving(tensor, _arrived)
        else:
            self._move(host, _bytes_of(tensor), to_device=False)
            held.moving(tensor, self._copies.ended())
        self._leaving.append(weakref.ref(held))
        return held

    def settle(self) -> None:
        """Let the device go of the tensors that were sent out, once they are there."""
        leaving, self._leaving = self._leaving, []
        for one in leaving:
            if (held := one()) is not None and not held.is_coming:
                held.settle()

    def prefetch(self, held: Held) -> None:
        """Begin the copy to the device, unless one is on its way; `back` is to follow."""
        if held.is_coming:
            return
        held.settle()  # it may not even have left
        shape, stride = held.shape, held.stride
        tensor = torch.empty_strided(shape, stride, dtype=held.dtype, device=held.device)
        held.is_coming = True
        if is_planned(tensor):
            without_values(TO_DEVICE, (tensor,), ())
            held.moving(tensor, _arrived)
            return
        self._move(held.pieces, _bytes_of(tensor), to_device=True)
        held.moving(tensor, self._copies.ended())

    def back(self, held: Held) -> Tensor:
        """The tensor on the device; it stays on the host for as long as `held` does."""
        self.prefetch(held)
        tensor = held.settle()
        assert tensor is not None
        return tensor

    def _move(self, pieces: Sequence[Tensor], flat: Tensor, *, to_device: bool) -> None:
        """Copy bytes (n,) of the device from or to pieces of the host that hold as many."""
        self._copies.follow()
        at = 0
        for piece in pieces:
            there = flat[at : at + piece.numel()]
            here = piece[: there.numel()]
            self._copies.copy(*((there, here) if to_device else (here, there)))
            at += piece.numel()

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        """Memory of the host for the bytes of a tensor."""
        nbytes, count = tensor.nbytes, -(-tensor.nbytes // PIECE)
        with _AROUND.get()():
            if self._locked:
                return [self._piece() for _ in range(count)]
            if is_planned(tensor) and device_type(tensor) == "cuda":
                nbytes = count * PIECE
            return [torch.empty(nbytes, dtype=torch.uint8)]

    def _piece(self) -> Tensor:
        with contextlib.suppress(IndexError):
            return self._free.pop()
        return host_memory(PIECE)


_UNLOCKED: list[str] = []
"""Why there is no page-locked memory any more, once there was none."""


def host_memory(nbytes: int) -> Tensor:
    """Page-locked bytes (nbytes,), or ordinary ones where there are none left; a power of two."""
    if not _UNLOCKED:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _UNLOCKED.append(str(error).splitlines()[0])
            warnings.warn(
                f"no page-locked memory for {nbytes} bytes more ({_UNLOCKED[0]}): going on with "
                "ordinary memory, whose copies to and from the device are slower",
                stacklevel=2,
            )
    return torch.empty(nbytes, dtype=torch.uint8)


def copies_on(device: torch.device) -> Copies:
    """Copies by a stream of the device's, or plain ones where it has none."""
    return _Stream(device) if has_own_memory(device) else Copies()


def is_planned(tensor: Tensor) -> bool:
    """Whether it stands for a tensor of a device in a plan, where all are on the CPU."""
    return not has_values(tensor) and tensor.device.type == "cpu"


def _in_order(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions as they lie in memory."""
    places = range(tensor.dim())
    return tensor.permute(sorted(places, key=lambda place: tensor.stride(place), reverse=True))


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes (n,) of a dense tensor, as they lie."""
    return _in_order(tensor).view(-1).view(torch.uint8)


class _Stream(Copies):
    """A stream of a CUDA device for copies, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def ended(self) -> Wait:
        event = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(event)

    def inside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)


def _arrived() -> None:
    """Of a copy that is done when the call returns."""

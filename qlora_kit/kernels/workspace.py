"""Memory that one call after another uses again, by thread and dtype.

On the CPU a fresh tensor of a weight's size costs more than what is written to it: its pages come
from the system one by one.

Who counts memory is told of every workspace. On CUDA backward runs in a thread of autograd's, which
shares nothing of this kind with the thread that called it; so what is made on a device is told to
whoever counts last where its own thread does not count.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from qlora_kit.device.target import device_type

Listener = Callable[[str, Iterable[Tensor]], None]


class _Held(threading.local):
    """The workspace of a thread, by dtype."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}
        self.tag: Listener | None = None


_HELD = _Held()
_TAGS: list[Listener] = []
"""Of all threads, in the order in which they began."""


@contextlib.contextmanager
def own_workspace(held: dict[torch.dtype, Tensor]) -> Iterator[None]:
    """Inside, this thread has the workspace `held`, which may be empty and is kept up to date."""
    before, _HELD.held = _HELD.held, held
    try:
        yield
    finally:
        _HELD.held = before


@contextlib.contextmanager
def tagged_workspace(tag: Listener) -> Iterator[None]:
    """Inside, `tag` is called with the workspace of this thread: what is there, what is made."""
    tag("workspace", _HELD.held.values())
    before, _HELD.tag = _HELD.tag, tag
    _TAGS.append(tag)
    try:
        yield
    finally:
        _TAGS.remove(tag)
        _HELD.tag = before


def workspace(numel: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory (numel,) that the next call of this thread for this dtype may hand out again.

    On CUDA it comes from the caching allocator, which does this for the whole process.
    """
    held, tag = _HELD.held, _HELD.tag
    if device_type(like) != "cpu":
        fresh = torch.empty(numel, dtype=dtype, device=like.device)
        tag = tag or (_TAGS[-1] if _TAGS else None)
    elif dtype not in held or held[dtype].numel() < numel:
        held.pop(dtype, None)  # the smaller one goes before the larger one comes
        fresh = held[dtype] = torch.empty(numel, dtype=dtype)
    else:
        return held[dtype][:numel]
    if tag is not None:
        tag("workspace", (fresh,))
    return fresh[:numel]

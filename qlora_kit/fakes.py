"""Tensors without values: what code asks that also runs on the fake tensors of a memory plan.

A plan runs the real loading and the real training step on torch's fake tensors, which have a shape
and a dtype only. They are all on the CPU, whatever device the plan is for: fake CUDA tensors end
the process at their first backward pass where torch has no CUDA (torch 2.13). So code that does
another thing on another device asks `device_type` here, and code that looks at a number asks
`has_values` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_PLANNED: ContextVar[str | None] = ContextVar("planned_device", default=None)
REPRESENTATIVES = 3


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in it."""
    return not isinstance(tensor, FakeTensor)


def device_type(tensor: Tensor) -> str:
    """`cpu` or `cuda`: where a tensor is, or where a plan means it to be."""
    planned = _PLANNED.get()
    return tensor.device.type if planned is None or has_values(tensor) else planned


def representative(places: Sequence[int], like: Tensor) -> Sequence[int]:
    """Of the `places` of a loop the first and the last two, where `like` has no values.

    What a loop makes in between is no more than it makes there: so a plan takes as long for many
    rows as for few.
    """
    if has_values(like) or len(places) <= REPRESENTATIVES:
        return places
    return [places[0], places[-2], places[-1]]


@contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Inside, fake tensors stand for tensors on a device of this kind."""
    before = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(before)

"""What a planned run allocates and frees, event by event, to be replayed by an allocator.

The run is the plan's own, on fake tensors: loading, adapters, optimizer states, then a step through
all of its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

from caching_allocator import Block, CachingAllocator
from torch import Tensor

from qlora_kit.memory.counter import StorageCounter
from qlora_kit.plan import fake_model
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.repeat import RepeatedQuantize

Event = tuple[int, int]
"""An allocation's number and its bytes; -1 where it is freed."""
WORKSPACE = 2 * 4096 * 1024 + 8 * 16 * 1024
"""Bytes of a cuBLAS workspace by torch's default (`:4096:2:16:8`, CUDABlas.cpp): one for the thread
of the forward pass and one for that of the backward pass, both from the caching allocator."""


class RecordingCounter(StorageCounter):
    """A counter that notes each allocation on the device, and its end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.events: list[Event] = []
        self.numbers: dict[int, int] = {}
        """The numbers of what lives, by storage."""
        self.count, self.is_quiet = 0, False
        self.elsewhere: set[int] = set()
        """The numbers of what turned out to lie in other memory, or to be the plan's own."""

    def note(self, key: int, size: int) -> None:
        """Something of so many bytes is on the device from here on."""
        if size and not self.is_quiet:
            self.numbers[key] = self.count
            self.events.append((self.count, size))
            self.count += 1

    def tag(self, component: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            was = self._live.get(key)
            super().tag(component, (tensor,))
            if was is None or (was[1] in self._apart) == (component in self._apart):
                continue
            if component not in self._apart:
                self.note(key, was[0])
                continue
            if was[1] != "gradients" and key in self.numbers:
                self.elsewhere.add(self.numbers[key])
            self._end(key)

    def _add(self, tensor: Tensor, component: str) -> None:
        key = tensor.untyped_storage()._cdata
        is_new = key not in self._live
        super()._add(tensor, component)
        if is_new and component not in self._apart:
            self.note(key, self._live[key][0])

    def _remove(self, key: int) -> None:
        super()._remove(key)
        self._end(key)

    def _end(self, key: int) -> None:
        number = self.numbers.pop(key, None)
        if number is not None:
            self.events.append((number, -1))


class RecordedQuantize(RepeatedQuantize):
    """Notes for each further linear of a shape what the first one allocated and freed."""

    _counter: RecordingCounter

    def __init__(self, counter: RecordingCounter, apart: Any) -> None:
        super().__init__(counter, apart)
        self._firsts: dict[Any, tuple[list[Event], list[int | None]]] = {}

    def __call__(self, weight: Tensor, *args: Any, **options: Any) -> Any:
        counter, key = self._counter, (weight.shape, weight.dtype)
        if key not in self._firsts:
            begin = len(counter.events)
            layer = super().__call__(weight, *args, **options)
            numbers = [counter.numbers.get(storage) for storage in _storages(layer)]
            self._firsts[key] = counter.events[begin:], numbers
            return layer
        events, numbers = self._firsts[key]
        again: dict[int, int] = {}
        for number, size in events:
            if size >= 0:
                again[number] = counter.count
                counter.count += 1
            if number in again:
                counter.events.append((again[number], size))
        counter.is_quiet = True
        layer = super().__call__(weight, *args, **options)
        counter.is_quiet = False
        for storage, number in zip(_storages(layer), numbers, strict=True):
            if number in again:
                counter.numbers[storage] = again[number]
        return layer


def _storages(layer: Any) -> list[int]:
    tensors = [*layer._buffers.values(), layer.weight]
    return [one.untyped_storage()._cdata for one in tensors if isinstance(one, Tensor)]


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Inside, planners are made that record."""
    with (
        mock.patch.object(fake_model, "StorageCounter", RecordingCounter),
        mock.patch.object(fake_model, "RepeatedQuantize", RecordedQuantize),
    ):
        yield


class RecordedRun:
    """A planner made while recording, and the events until its first step."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self._counter = planner, planner.run._counter
        assert isinstance(self._counter, RecordingCounter)
        elsewhere = self._counter.elsewhere
        self.loading = [one for one in self._counter.events if one[0] not in elsewhere]

    def step(self, shape: BatchShape, plan: MemoryPlan) -> list[Event]:
        """The events of a step with the levels of a plan, through all layers, and its update."""
        run, begin = self.planner.run, len(self._counter.events)
        run.take_optimizer(plan.optim)
        run.packed, run.longest_row = shape.packed, shape.length
        steps = self.planner.training.gradient_accumulation_steps
        batches = run.micro_batches(shape.rows, shape.length, shape.supervised, steps)
        run.trace(batches, range(len(run.layers)), plan.levels)
        run._update()
        return self._counter.events[begin:]


def reserved(
    loading: Sequence[Event], steps: Iterable[Sequence[Event]], allocator: CachingAllocator
) -> int:
    """The most that a run reserves. Errors: `FullError` where the device has not so much."""
    held = _replayed(loading, allocator, {})
    for _ in range(2):
        allocator.malloc(WORKSPACE)
    for step in steps:
        for block in _replayed(step, allocator, held).values():
            allocator.free(block)
    return allocator.peak_reserved


def _replayed(
    events: Sequence[Event], allocator: CachingAllocator, held: dict[int, Block]
) -> dict[int, Block]:
    """What of these events is there after them; `held` is what was there before."""
    own: dict[int, Block] = {}
    for number, size in events:
        if size >= 0:
            own[number] = allocator.malloc(size)
        elif number in own:
            allocator.free(own.pop(number))
        elif number in held:
            allocator.free(held.pop(number))
    return own

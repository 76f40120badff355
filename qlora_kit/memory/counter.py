"""Bytes of tensors by component, each storage once: held, and live in each interval of some work.

`StorageCounter` is entered around some work. Every operation's tensors are looked at; a storage
that is new is counted until it dies. What it belongs to is a tag that was handed in (loading,
injection, the optimizer), else the component that is being filled now (`filling`). Time is cut into
intervals by `at`, each with its own peak, so that one run of a step says where each byte went and
when. It counts real and fake tensors alike: a memory plan is this counter around fake ones.

Left out: bytes inside kernels, which are not tensors. It slows the work down; without it nothing
is slower.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.base.tagged import tag_weights
from qlora_kit.base.tensors import Tag
from qlora_kit.device.target import is_on_host
from qlora_kit.device.transfer import around_host
from qlora_kit.training.optimizer import tag_states

Sizes = dict[str, int]
"""Bytes by component."""
COMPONENTS = (
    "weights_quantized",
    "weights_other",
    "adapters",
    "gradients",
    "optimizer",
    "paged",
    "activations",
    "loss",
    "workspace",
)
"""Of a step, in the order in which they are shown."""
HOST = "host"
"""Memory of the host that tensors of the device are sent to: on CUDA it lies apart."""

ASKS_DEVICE = torch.ops.prim.device.default
"""Every look at the device of a fake tensor, more often than all else; nothing is made."""


@dataclass
class Interval:
    """What was alive while a step was at one place: in `phase`, in `module`.

    `peak` is the most at once, `at_peak` its components, `largest` the most of each component.
    `work` says how often the step did what, where somebody notes it.
    """

    phase: str
    module: str
    start: Sizes
    end: Sizes
    at_peak: Sizes
    largest: Sizes
    peak: int = field(default=0)
    work: Counter[Any] = field(default_factory=Counter)


Observer = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Is shown every operation with its arguments and its result."""


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered.

    What `model` holds is there from the beginning. `peak` is the most that was alive at once,
    `before` what was alive when counting began; `intervals` are in the order of time. Components
    that lie `apart`, in other memory, are counted by themselves and are in no sum. An
    `observer` sees what is counted.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        filling: str = "activations",
        apart: Iterable[str] = ("paged",),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._apart = frozenset(apart)
        self._live: dict[int, tuple[int, str]] = {}
        self._model = model
        self._told: list[contextlib.AbstractContextManager[None]] = []
        self.filling = filling
        self.observer: Observer | None = None
        self.sizes: Sizes = dict.fromkeys(COMPONENTS, 0)
        self.current = self.before = 0
        self.intervals = [Interval("", "", {}, {}, {}, {})]

    @property
    def peak(self) -> int:
        """The most bytes at once, over all intervals."""
        return max(interval.peak for interval in self.intervals)

    def __enter__(self) -> StorageCounter:
        if self._model is not None:
            self.tag("model", (*self._model.parameters(), *self._model.buffers()))
        self.before = self.current
        self._told.append(around_host(lambda: self._filled_with(HOST)))
        self._told[-1].__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self.intervals[-1].end = dict(self.sizes)
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._told.pop().__exit__(None, None, None)

    def at(self, phase: str, module: str = "") -> None:
        """A new interval begins."""
        now = dict(self.sizes)
        self.intervals[-1].end = now
        self.intervals.append(Interval(phase, module, now, now, now, dict(now), peak=self.current))

    @contextlib.contextmanager
    def _filled_with(self, component: str) -> Iterator[None]:
        """Inside, what is made belongs to a component."""
        before, self.filling = self.filling, component
        try:
            yield
        finally:
            self.filling = before

    def tag(self, component: str, tensors: Iterable[Tensor]) -> None:
        """Count some tensors as `component` from here on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._add(tensor, component)
            elif known[1] != component:
                self._change(known[1], -known[0])
                self._live[storage._cdata] = (known[0], component)
                self._change(component, known[0])
        self._look()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is ASKS_DEVICE:
            return args[0].fake_device  # real ones are not asked in this way
        result = func(*args, **kwargs)
        for given in (args, kwargs.values(), (result,)):
            self._add_all(given)
        self._look()
        if self.observer is not None:
            self.observer(func, args, kwargs, result)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's compiler is not asked to leave every operation alone, which takes its time.
        return False

    def _add_all(self, values: Iterable[Any]) -> None:
        """Count the tensors among the arguments or results of an operation."""
        for value in values:
            if isinstance(value, Tensor):
                self._add(value, HOST if is_on_host() else self.filling)
            elif isinstance(value, (list, tuple)):
                self._add_all(value)

    def _add(self, tensor: Tensor, component: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = (size, component)
        self._change(component, size)
        # A storage keeps its Python object for as long as it lives.
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        size, component = self._live.pop(key)
        self._change(component, -size)

    def _change(self, component: str, size: int) -> None:
        if component not in self._apart:
            self.current += size
        now = self.sizes[component] = self.sizes.get(component, 0) + size
        largest = self.intervals[-1].largest
        if now > largest.get(component, 0):
            largest[component] = now

    def _look(self) -> None:
        interval = self.intervals[-1]
        if self.current > interval.peak:
            interval.peak, interval.at_peak = self.current, dict(self.sizes)


def most_of_each(intervals: Iterable[Interval]) -> Sizes:
    """The most bytes of each component over some intervals, all of `COMPONENTS` among them."""
    found = dict.fromkeys(COMPONENTS, 0)
    for interval in intervals:
        for component, most in interval.largest.items():
            found[component] = max(most, found.get(component, 0))
    return found


def weight_bytes(model: nn.Module) -> Sizes:
    """Bytes of the frozen base: `weights_quantized`, `weights_other` and `weights`, their sum."""
    sizes = {"weights_quantized": 0, "weights_other": 0}
    held = held_bytes(lambda tag: tag_weights(model, tag))
    sizes = {name: held.get(name, 0) for name in sizes}  # and nothing of what is on the host
    return {**sizes, "weights": sum(sizes.values())}


def adapter_bytes(model: nn.Module) -> Sizes:
    """Bytes of the adapters' masters, and of the gradients that are there now."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    return {"adapters": tensor_bytes(trained), "gradients": tensor_bytes(gradients)}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> Sizes:
    """Bytes of the optimizer's states; `paged` are those in managed memory."""
    return {"optimizer": 0, "paged": 0} | held_bytes(lambda tag: tag_states(optimizer, tag))


def held_bytes(hand_over: Callable[[Tag], None]) -> Sizes:
    """Bytes by component of what is handed over, each storage once."""
    sizes: Sizes = {}
    seen: set[int] = set()

    def tag(component: str, tensors: Iterable[Tensor]) -> None:
        new = [one for one in tensors if one.untyped_storage()._cdata not in seen]
        seen.update(one.untyped_storage()._cdata for one in new)
        sizes[component] = sizes.get(component, 0) + tensor_bytes(new)

    hand_over(tag)
    return sizes


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what some tensors lie in, each storage once."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())

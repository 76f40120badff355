"""A fake accelerator: a device of its own kind on which fake tensors run forward and backward.

torch lets a Python program register a backend (`PrivateUse1`). Fake tensors on it have a shape, a
dtype and a device and no values, so that the package's own loading, training step and decoding run
on a machine without a card, and say what they would do on one: an operation that mixes devices
raises, a value that is read by the host raises or is counted, copies between host and device are
counted, and backward runs in a thread of its own as on CUDA. Fake tensors on `cuda` end the process
at their first backward pass where torch has no CUDA (torch 2.13).

    with accelerator((8, 6)) as card:
        model = card.load(directory, bits=4)
        with card.watch() as seen:
            ...
    assert seen.copied_in == [...]

Inside, tensors on the device are planned for a CUDA card of that compute capability
(`device/target.py`), so that the code chooses what it would choose there. What the fakes do not
show: values, kernels that only CUDA has where the code asks torch and not itself (the library's
scaled_dot_product_attention is seen as its plain product here), and streams.

Registering is for the whole process: `torch.accelerator` then says that there is one. So tests of
it run in a process of their own (`tests/accelerator/conftest.py`).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from any_model import save_random
from families import TRAITS, save_checkpoint
from micro_batches import ragged_rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from transformers.utils import import_utils

from qlora_kit.base.base import Base
from qlora_kit.base.fill import fill
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.data.batch import Batch, collate, collate_packs
from qlora_kit.device import target
from qlora_kit.device.target import Capability, planned_device
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

_FOLDER = tempfile.TemporaryDirectory(prefix="accelerator ")
NAME = "npy"  # what Tensor has as a method, and the only name that torch 2.13 shows for this
ASKS_DEVICE = torch.ops.prim.device.default
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
"""The operations for which the host waits, whatever they are called by."""
BY_INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
"""Those whose results depend on how much of a mask is true."""
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class HostReadError(AssertionError):
    """The host reads a value of the device where it may not."""


class MixedDevicesError(AssertionError):
    """An operation takes tensors of the host and of the device."""


@dataclass(frozen=True)
class Copied:
    """A tensor that went between host and device, in the dtype that it came in.

    torch converts it before it goes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def place() -> str:
    """Where the program is: in the package, and in whatever it has called, torch left out."""
    ours, theirs, frame = "", "", sys._getframe()
    while frame.f_back is not None and not ours:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            here = f"{file}:{frame.f_lineno}"
            theirs = theirs or here
            ours = here if "/qlora_kit/" in file else ""
    return f"at {ours or '?'}, {theirs or '?'}"


def copied(tensors: Iterable[Tensor]) -> list[Copied]:
    """What copying these tensors is seen as, in an order of its own."""
    return in_order(Copied(tuple(one.shape), one.dtype) for one in tensors)


def of_batch(*batches: Batch) -> list[Copied]:
    """What a step copies: the tensors of its batches, each once."""
    return copied(
        one for batch in batches for one in batch.values() if isinstance(one, torch.Tensor)
    )


def small_batch(packed: bool = False, seed: int = 0) -> Batch:
    """Two sequences of random tokens, with values; of two rows each where they are packed."""
    rows = ragged_rows(4, seed)
    with unset_fake_temporarily():
        return collate_packs([rows[:2], rows[2:]], 0) if packed else collate(rows[:2], 0)


def in_order(copies: Iterable[Copied]) -> list[Copied]:
    """Copies in an order that does not depend on when they were made."""
    return sorted(copies, key=lambda one: (one.shape, str(one.dtype)))


class Seen(TorchDispatchMode):
    """What operations on the device do; those of backward, in its thread, too.

    `copied_in` went from the host to the device, `copied_out` the other way, `reads` are the shapes
    of tensors whose values were asked for; `places` says of each of these where, for whoever looks
    for it. `operations` counts operations by name, with their texts where they are given any (the
    name of a kernel, of a format); `results` has the name and the shape of every result on the
    device. Without `may_read` a read raises; with it every value is 1.
    """

    def __init__(self, device: torch.device, may_read: bool = False) -> None:
        super().__init__()
        self._device, self._may_read = device, may_read
        self.copied_in: list[Copied] = []
        self.copied_out: list[Copied] = []
        self.reads: list[tuple[int, ...]] = []
        self.places: list[str] = []
        self.operations: Counter[str] = Counter()
        self.results: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is ASKS_DEVICE:
            return args[0].fake_device
        # Each thread has its own mark for this, and that of backward is not asked before.
        torch._C._set_only_lift_cpu_tensors(True)
        kwargs = kwargs or {}
        here, away = [], []
        for one in tensors_in((*args, *kwargs.values())):
            (here if one.device.type == NAME else away).append(one)
        if here:
            self._check(func, away, kwargs.get("generator"))
            if func in BY_INDEX and any(one.dtype is torch.bool for one in tensors_in(args[1])):
                self.read(here[0], f"{func} with a mask")
            if func in READS:
                self.read(here[0], str(func))
                if func is torch.ops.aten._local_scalar_dense.default:
                    return stand_in(here[0].dtype)
        if func in COPIES:
            self._copy(func, args, kwargs)
        result = func(*args, **kwargs)
        made = [tuple(one.shape) for one in tensors_in((result,)) if one.device.type == NAME]
        if here or made:
            name = func._schema.name
            self.operations[name] += 1
            for text in args:
                if type(text) is str:
                    self.operations[f"{name} {text}"] += 1
            self.results.update((name, shape) for shape in made)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is asked around every operation

    def read(self, tensor: Tensor, by: str) -> None:
        """The host asks for the values of a tensor of the device."""
        self.reads.append(tuple(tensor.shape))
        what = f"the host reads {tuple(tensor.shape)} {tensor.dtype} by {by} {place()}"
        self.places.append(what)
        if not self._may_read:
            raise HostReadError(what)

    def _check(self, func: Any, away: list[Tensor], generator: Any) -> None:
        """Refuse what takes tensors of the device, and others; CUDA takes numbers of the host."""
        if generator is not None and DeviceGenerator.is_of_host(generator):
            raise MixedDevicesError(f"{func}: a generator of the host")
        if func not in COPIES and (shapes := [tuple(one.shape) for one in away if one.dim()]):
            raise MixedDevicesError(f"{func}: {shapes} on the host")

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        into_place = func is torch.ops.aten.copy_.default
        source = args[1] if into_place else args[0]
        device = args[0].device if into_place else kwargs.get("device") or source.device
        if device.type == source.device.type or not source.numel():
            return
        dtype = args[0].dtype if into_place else kwargs.get("dtype") or source.dtype
        what = Copied(tuple(source.shape), dtype)
        if device.type == NAME:
            self.copied_in.append(what)
            self.places.append(f"{what} goes up {place()}")
        else:
            self.copied_out.append(what)
            # Nobody waits for a copy that is asked not to be waited for.
            if not (into_place and len(args) > 2 and args[2]):
                self.read(source, str(func))


class Accelerator:
    """What `accelerator` gives: the device, its mode of fake tensors, models on it."""

    def __init__(self, device: torch.device, mode: FakeTensorMode) -> None:
        self.device, self.mode = device, mode
        self.watching: Seen | None = None

    @contextlib.contextmanager
    def watch(self, may_read: bool = False) -> Iterator[Seen]:
        """Inside, what operations do is seen."""
        before, self.watching = self.watching, Seen(self.device, may_read)
        try:
            with self.watching:
                yield self.watching
        finally:
            self.watching = before

    def open(
        self, directory: Path | str, *, bits: int = 4, dtype: str = "bf16", **how: Any
    ) -> Base:
        """The base in a directory, opened for this device; `how` are options of `BaseConfig`."""
        # Headers have values.
        with unset_fake_temporarily():
            config = BaseConfig(str(directory), bits=bits, dtype=dtype, device="cpu", **how)
            return replace(open_base(config), device=self.device)

    def load(self, directory: Path | str, placement: Placement = ON_DEVICE, **how: Any) -> Any:
        """The frozen model of the base in a directory, as loading leaves it on the device."""
        base = self.open(directory, **how)
        # A model of a family without a record is tried on some tokens then, and may be waited for.
        with self.watch(may_read=True) if self.watching is None else contextlib.nullcontext():
            return fill(base, lambda entry, into: None, placement=placement)

    def adapted(
        self,
        directory: Path | str,
        *,
        recompute: str = "none",
        packed: bool = False,
        dropout: float = 0.0,
        targets: str = "all-linear",
        fused: bool = True,
        placement: Placement = ON_DEVICE,
        **how: Any,
    ) -> Any:
        """The same with adapters, made ready as a run does before its first step."""
        model = self.load(directory, placement, **how)
        inject_lora(model, LoRAConfig(r=4, target_modules=targets, dropout=dropout), seed=0)
        prepare_model(model, TrainingConfig(fused_blocks=fused), recompute, packed, placement)
        return model.train()

    def optimizer(self, model: Any, name: str = "adamw") -> torch.optim.Optimizer:
        """An optimizer over what is trained."""
        return make_optimizer(name, model.parameters(), 1e-3)

    def on_host(self, batch: Mapping[str, Any]) -> Any:
        """A batch whose tensors are fake ones of the host; it is made outside, with values."""
        return {
            key: self.mode.from_tensor(value) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


@contextlib.contextmanager
def accelerator(card: Capability = (8, 6), kind: str = "cuda") -> Iterator[Accelerator]:
    """Inside, there is a device that stands for a card of this compute capability."""
    device, mode = register(), _Mode(allow_non_fake_inputs=True)
    here = Accelerator(device, mode)
    with contextlib.ExitStack() as around:
        # A tensor on CUDA says so itself, in the thread of backward as well, where a plan's context
        # variable is not: so here it is one for all threads.
        around.enter_context(replaced(target, "_PLANNED", _Everywhere()))
        around.enter_context(replaced(torch, "Generator", DeviceGenerator))
        # transformers reads no values where it takes itself to be compiled; a run reads them.
        around.enter_context(replaced(import_utils, "is_fake_tensor", lambda tensor: False))
        around.enter_context(replaced(FakeTensor, "tolist", _tolist(here)))
        # Whether two tensors are the same memory is asked by their addresses.
        around.enter_context(replaced(FakeTensor, "data_ptr", lambda tensor: id(tensor)))
        around.enter_context(planned_device(kind, card))
        around.enter_context(mode)
        yield here


@cache
def saved(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """The directory of a tiny checkpoint of a family, made once in a process.

    `changes` are those of its config. A family without a record is saved in fp32.
    """
    directory = Path(_FOLDER.name) / f"{family} {dtype} {changes}"
    with unset_fake_temporarily():
        if family in TRAITS:
            save_checkpoint(directory, family, dtype, **changes)
        else:
            save_random(directory, family, **changes)
    return directory


@cache
def register() -> torch.device:
    """The device, registered in this process for good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    return torch.device(NAME, 0)


class _Backend(_DummyBackendModule):
    """What torch asks of a backend's module, autocast in recomputation included."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Mode(FakeTensorMode):
    """Fake tensors in a process with a device that is registered and cannot hold a tensor."""

    avoid_device_init = True  # type: ignore[assignment]  # lists become tensors of the host first


class _Everywhere:
    """What a context variable is, with one value for all threads."""

    def __init__(self) -> None:
        self._value: Any = None

    def get(self) -> Any:
        return self._value

    def set(self, value: Any) -> Any:
        before, self._value = self._value, value
        return before

    def reset(self, before: Any) -> None:
        self._value = before


class DeviceGenerator(torch.Generator):
    """A generator of the host that stands for one of the device, which has none of its own.

    An operation is given another object of the same generator; it is known again by its seed.
    """

    seeds: ClassVar[dict[str, set[int]]] = {}

    def __new__(cls, device: Any = "cpu") -> DeviceGenerator:
        made = super().__new__(cls, device="cpu")
        made._kind = torch.device(device).type
        made.manual_seed(sum(map(len, cls.seeds.values())))
        return made

    def manual_seed(self, seed: int) -> DeviceGenerator:
        super().manual_seed(seed)
        self.seeds.setdefault(self._kind, set()).add(seed)
        return self

    @classmethod
    def is_of_host(cls, generator: torch.Generator) -> bool:
        """Whether no generator of the device has the seed of this one."""
        return generator.initial_seed() not in cls.seeds.get(NAME, ())


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def stand_in(dtype: torch.dtype) -> Any:
    """The value of every element: one that is true, finite and a token."""
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results, those in lists too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def _tolist(here: Accelerator) -> Any:
    """`Tensor.tolist` as one transfer; torch's fakes ask for one value after another."""
    of_fakes = FakeTensor.tolist

    def nested(shape: tuple[int, ...], value: Any) -> Any:
        if not shape:
            return value
        return [nested(shape[1:], value) for _ in range(shape[0])]

    def tolist(tensor: Tensor) -> Any:
        if tensor.device.type != NAME or here.watching is None:
            return of_fakes(tensor)
        here.watching.read(tensor, "tolist")
        return nested(tuple(tensor.shape), stand_in(tensor.dtype))

    return tolist

"""What tensors are on, or are planned for, and which dtypes are multiplied there.

A plan runs the real loading and the real training step on torch's fake tensors, which have a shape
and a dtype only. They are all on the CPU, whatever device the plan is for: fake CUDA tensors end
the process at their first backward pass where torch has no CUDA (torch 2.13). So code that does
another thing on another device asks `device_type` here, code that takes another kernel on another
card asks `capability`, and code that looks at a number asks `has_values` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The compute dtypes by their short names."""

Capability = tuple[int, int]
"""A CUDA card's compute capability: (7, 5) of a T4, (8, 6) of an RTX 30, (9, 0) of an H100."""

ASSUMED: Capability = (8, 6)
"""Of a card that is planned for where there is none: all since 2020 have this or more."""

PLAINEST: Capability = (7, 5)
"""Of a card that gets no kernel which only newer ones have."""

KernelListener = Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]

_PLANNED: ContextVar[tuple[str, Capability] | None] = ContextVar("planned_device", default=None)
_ON_HOST: ContextVar[bool] = ContextVar("on_host", default=False)
_TURNS: ContextVar[int] = ContextVar("turns", default=1)
_KERNELS: ContextVar[KernelListener | None] = ContextVar("kernels", default=None)


REPRESENTATIVES = 3
Place = TypeVar("Place")
Value = TypeVar("Value")


@contextmanager
def set_inside(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """Inside, a context variable has this value."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def known_inside(variable: ContextVar[tuple[Any] | None], asked: Any) -> Any:
    """`asked`, but where `variable` is set a function that gives the one thing which that holds.

    It takes the place of a library's function once and for all threads: each that put one there
    and back would find another's.
    """

    def answer(*arguments: Any) -> Any:
        # torch (2.13) compiles no read of a ContextVar.
        known = None if torch.compiler.is_compiling() else variable.get()
        return asked(*arguments) if known is None else known[0]

    return answer


@contextmanager
def on_host() -> Iterator[None]:
    """Inside, what is made lies in the host's memory, in a plan for another device as well."""
    planned = _PLANNED.get()
    apart = planned is not None and planned[0] != "cpu"
    here = None if planned is None else ("cpu", planned[1])
    with set_inside(_ON_HOST, apart), set_inside(_PLANNED, here):
        yield


def is_on_host() -> bool:
    """Whether what is made now lies in the host's memory, apart from that of a planned device."""
    return _ON_HOST.get()


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory of its own, an allocator for it, and managed memory beside it."""
    return device.type == "cuda"


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in it."""
    return not isinstance(tensor, FakeTensor)


def device_type(tensor: Tensor) -> str:
    """`cpu` or `cuda`: where a tensor is, or where a plan means it to be."""
    planned = _PLANNED.get()
    return tensor.device.type if planned is None or has_values(tensor) else planned[0]


def capability(tensor: Tensor) -> Capability | None:
    """The compute capability of the card that a tensor is on, or is planned for; None elsewhere."""
    if device_type(tensor) != "cuda":
        return None
    planned = _PLANNED.get()
    if planned is not None and not has_values(tensor):
        return planned[1]
    return _of_the_card(tensor.device)


def is_rocm() -> bool:
    """Whether torch's `cuda` is AMD's: built for ROCm."""
    return torch.version.hip is not None


def _of_the_card(device: torch.device | None = None) -> Capability:
    """The compute capability of a card that is here, of the current one if none is named.

    AMD's numbers say something else (gfx1100 has (11, 0)): there it is `PLAINEST`.
    """
    return PLAINEST if is_rocm() else torch.cuda.get_device_capability(device)


def representative(places: Sequence[Place], like: Tensor) -> Iterable[Place]:
    """Of the `places` of a loop the first and the last two, where `like` has no values.

    What a loop makes in between is no more than it makes there: so a plan takes as long for many
    rows as for few. The last but one stands for those that are left out (`turns`).
    """
    if has_values(like) or len(places) <= REPRESENTATIVES:
        return places
    return _represented(places)


def _represented(places: Sequence[Place]) -> Iterator[Place]:
    yield places[0]
    with set_inside(_TURNS, _TURNS.get() * (len(places) - 2)):
        yield places[-2]
    yield places[-1]


def turns() -> int:
    """How many turns of a loop what runs now stands for."""
    return _TURNS.get()


def without_values(kernel: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """Say of a kernel that is not called, for its tensors have no values, what it would do."""
    if (listener := _KERNELS.get()) is not None:
        listener(kernel, reads, writes)


def heard_kernels(listener: KernelListener) -> AbstractContextManager[None]:
    """Inside, `listener` is told of every kernel that `without_values` says is not called."""
    return set_inside(_KERNELS, listener)


def planned_device(kind: str, card: Capability | None = None) -> AbstractContextManager[None]:
    """Inside, fake tensors stand for tensors on a device of this kind.

    On CUDA `card` is its compute capability; without it that of the card here, or `ASSUMED`.
    """
    if card is None:
        card = _of_the_card() if torch.cuda.is_available() else ASSUMED
    return set_inside(_PLANNED, (kind, card))


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`; torch's own name for any other."""
    short = {value: key for key, value in DTYPES.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))


TILES = torch.cpu._is_amx_tile_supported()  # torch 2.13 has no public name for it
"""Whether the processor has matrix tiles (AMX)."""


def _native_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that the processor multiplies, as torch is allowed to use it.

    Without tiles too bf16 is the faster one: on an AMD EPYC (Zen 5, AVX512-BF16) 4 times in both
    directions (`y = x W^T` and `grad W`, 512 x 4096 x 4096, torch 2.13, a core: 38 and 44 ms
    against 174 and 173). A processor's instructions decide, never a measurement at start: results
    must not depend on what else a machine does.
    """
    has = torch.cpu.get_capabilities()
    if has.get("architecture") in ("x86_64", "amd64", "i386"):
        # ATEN_CPU_CAPABILITY=avx2 keeps torch from them. They are all extensions of AVX512.
        wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
        found = {
            torch.bfloat16: wide and (has.get("avx512_bf16") or has.get("amx_bf16")),
            torch.float16: wide and (has.get("avx512_fp16") or has.get("amx_fp16")),
        }
    else:
        found = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    return frozenset(dtype for dtype, there in found.items() if there)


NATIVE = _native_dtypes()


_NATIVE: ContextVar[frozenset[torch.dtype]] = ContextVar("native_dtypes", default=NATIVE)


def processor_with(*dtypes: torch.dtype) -> AbstractContextManager[None]:
    """Inside, the processor is taken for one that multiplies these 16-bit dtypes and no others."""
    return set_inside(_NATIVE, frozenset(dtypes))


def is_native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in `dtype`."""
    return dtype not in (torch.bfloat16, torch.float16) or dtype in _NATIVE.get()


def sent(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers of the host, or rows of them, as a tensor on a device, which nobody waits for."""
    return torch.tensor(numbers).to(device, non_blocking=True)

"""Which device and dtype a run takes, and what a device has: the one place that knows of devices.

A plan runs the real loading and the real training step on torch's fake tensors, which have a shape
and a dtype only. They are all on the CPU, whatever device the plan is for: fake CUDA tensors end
the process at their first backward pass where torch has no CUDA (torch 2.13). So code that does
another thing on another device asks `device_type` here, and code that looks at a number asks
`has_values` first.

`benchmarks/device_overhead.py` measures a row of `OVERHEADS`, what a process takes outside its
tensors, where there is a GPU. On the CPU a plan counts tensors: what the process takes beside them
(imports, pages of files) is the host's.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.errors import ResourceError

_PLANNED: ContextVar[str | None] = ContextVar("planned_device", default=None)
REPRESENTATIVES = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The compute dtypes by their short names."""


def find_device(name: str) -> torch.device:
    """The device of `--device`. Errors: `ResourceError` where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"--device {name}: {count} CUDA devices here", "use --device cpu, or install CUDA"
        )
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype`; auto is bf16 where the device has it, else fp16 (GPU) or fp32."""
    if name != "auto":
        return DTYPES[name]
    if has_own_memory(device):
        # Where there is no GPU it is planned for one: all since 2020 have bf16.
        found = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if found else torch.float16
    return torch.bfloat16 if is_native(torch.bfloat16) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`; torch's own name for any other."""
    short = {value: key for key, value in DTYPES.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory of its own, an allocator for it, and managed memory beside it."""
    return device.type == "cuda"


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


TILES = torch.cpu._is_amx_tile_supported()  # torch 2.13 has no public name for it
"""Whether the processor has matrix tiles (AMX)."""


def _native_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that the processor multiplies."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") in ("x86_64", "amd64", "i386"):
        found = {
            torch.bfloat16: has.get("avx512_bf16") or has.get("amx_bf16"),
            torch.float16: has.get("avx512_fp16") or has.get("amx_fp16"),
        }
    else:
        found = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    return frozenset(dtype for dtype, there in found.items() if there)


NATIVE = _native_dtypes()
_NATIVE: ContextVar[frozenset[torch.dtype]] = ContextVar("native_dtypes", default=NATIVE)


@contextmanager
def processor_with(*dtypes: torch.dtype) -> Iterator[None]:
    """Inside, the processor is taken for one that multiplies these 16-bit dtypes and no others."""
    before = _NATIVE.set(frozenset(dtypes))
    try:
        yield
    finally:
        _NATIVE.reset(before)


def is_native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in `dtype`."""
    return dtype not in (torch.bfloat16, torch.float16) or dtype in _NATIVE.get()


@contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Inside, fake tensors stand for tensors on a device of this kind."""
    before = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(before)


def peak_bytes(device: torch.device) -> int:
    """The largest number of bytes so far: allocated on CUDA, resident on the CPU."""
    if has_own_memory(device):
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where it can be helped: a process inherits that from the one that started it.
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_name(device: torch.device) -> str:
    """What `peak_bytes` are those of."""
    return "tensors" if has_own_memory(device) else "process"


def reserved_bytes(device: torch.device) -> int:
    """The most that the process took from the system: the allocator's blocks, or resident."""
    if has_own_memory(device):
        return torch.cuda.max_memory_reserved(device)
    return peak_bytes(device)


def free_bytes(device: torch.device) -> int:
    """What is left: of the GPU, or of the host within this process's limit."""
    if has_own_memory(device):
        return int(torch.cuda.mem_get_info(device)[0])
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    with contextlib.suppress(OSError, StopIteration):
        # Pages of files are given back when they are needed; the system says how many.
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(one for one in lines if one.startswith("MemAvailable:")).split()[1]) * 1024
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - int(Path("/proc/self/statm").read_text().split()[0]) * page)
    return free


def available_bytes(device: torch.device) -> int:
    """What a process may take of a device: what is free, and what it has taken already."""
    return free_bytes(device) + OVERHEADS[device.type].fixed


def empty_cache() -> None:
    """Give freed memory that the allocator holds back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for what the GPU was given, before the host reads managed memory."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def allocator_peaks() -> tuple[int, int]:
    """The most allocated and reserved bytes of the GPU since this was called before."""
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def describe_device(device: torch.device) -> str:
    """The device in words, with what its peak means."""
    if has_own_memory(device):
        return f"{torch.cuda.get_device_name(device)} (peak: allocated by the process)"
    return "cpu (peak: tensors of loading and of counted steps)"


@dataclass(frozen=True)
class Overhead:
    """Bytes outside tensors: `fixed` (context, libraries, workspaces), and `share` of the peak.

    Where a run is planned for a card, a share `margin` of its memory is left free.
    """

    fixed: int
    share: float
    margin: float
    source: str

    def of(self, peak_bytes: int) -> int:
        """The bytes beside tensors whose peak is `peak_bytes`."""
        return self.fixed + int(self.share * peak_bytes)

    def room(self, budget_bytes: int) -> int:
        """The most bytes of tensors that fit into a budget together with the rest."""
        return int((budget_bytes - self.fixed) / (1 + self.share))


OVERHEADS = {
    "cpu": Overhead(0, 0.0, 0.0, "tensors are counted; the process itself is not part of the plan"),
    "cuda": Overhead(
        450_000_000,
        0.0,
        0.02,  # holes between blocks of the caching allocator; a guess until it is measured
        "context and libraries, a common figure for cards of the last years, not measured here; "
        "benchmarks/device_overhead.py measures yours",
    ),
}

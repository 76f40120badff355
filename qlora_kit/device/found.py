"""The device of a run: found by its name, with its compute dtype and its memory.

`benchmarks/device_overhead.py` measures a row of `OVERHEADS`, what a process takes outside its
tensors, where there is a GPU. On the CPU a plan counts tensors: what the process takes beside them
(imports, pages of files) is the host's.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_kit.device.cards import Card, card_named
from qlora_kit.device.target import (
    DTYPES,
    dtype_name,
    has_own_memory,
    is_native,
    is_rocm,
    set_inside,
)
from qlora_kit.errors import ResourceError

_ROOM: ContextVar[int | None] = ContextVar("room", default=None)


def find_device(name: str) -> torch.device:
    """The device of `--device`; of several cards the one of that number is torch's from here on.

    What has no device in its call (bitsandbytes' waits and fills, the allocator's statistics) would
    else act on card 0. Errors: `ResourceError` where it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type not in OVERHEADS:
        raise ResourceError(
            f"--device {name}: {', '.join(OVERHEADS)} are what this package has run on or is "
            "written for",
            "use --device cpu; an AMD card is cuda to a torch that is built for ROCm",
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"--device {name}: torch {torch.__version__} sees {count} CUDA devices",
            "use --device cpu; for an NVIDIA card install its driver and a torch built for CUDA",
        )
    if device.index is not None and has_own_memory(device):
        torch.cuda.set_device(device)
    return device


def has_card() -> bool:
    """Whether torch sees a card."""
    return torch.cuda.is_available()


def dtype_notes(
    dtype: torch.dtype, device: torch.device, narrow: Iterable[torch.dtype] = ()
) -> tuple[str, ...]:
    """What a user should know of computing in `dtype` on a device, a sentence each.

    `narrow` are the dtypes that matrices are held in which are computed with in `dtype`.
    """
    if has_own_memory(device):
        return ()
    if not is_native(dtype):
        short = dtype_name(dtype)
        return (
            f"this processor has no instructions for {short}: weights and activations are {short}, "
            "and matmuls are made in fp32, part by part; --dtype fp32 rounds less, and its "
            "activations take twice the memory",
        )
    held = " and ".join(sorted({dtype_name(one) for one in narrow if not is_native(one)}))
    if not held:
        return ()
    return (
        f"this processor has no instructions for {held}: embedding, head and what else is not "
        f"quantized stay in {held}, and are computed with in {dtype_name(dtype)}",
    )


def device_notes(device: torch.device) -> tuple[str, ...]:
    """What a user should know of a device, a sentence each."""
    if not has_own_memory(device) or not is_rocm():
        return ()
    return (
        f"this torch is built for ROCm {torch.version.hip}: no run on an AMD card has been made "
        "with qlora_kit, so compare the loss of some steps with --device cpu first",
    )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype`; auto is bf16 where the device has it, else fp16 (GPU) or fp32."""
    if name != "auto":
        return DTYPES[name]
    if has_own_memory(device):
        # Where there is no GPU it is planned for one: all since 2020 have bf16.
        if not torch.cuda.is_available():
            return torch.bfloat16
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.bfloat16 if is_native(torch.bfloat16) else torch.float32


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


def with_room(free: int) -> AbstractContextManager[None]:
    """Inside, no device has more than `free` bytes left, whatever it says: as a smaller one."""
    return set_inside(_ROOM, free)


def free_bytes(device: torch.device) -> int:
    """What is left: of the GPU, or of the host within this process's limit."""
    room = _ROOM.get()
    return _free_bytes(device) if room is None else min(room, _free_bytes(device))


def _free_bytes(device: torch.device) -> int:
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


def card_of(device: torch.device) -> Card | None:
    """What is known of the card that a device is; None elsewhere, and of others."""
    if not has_own_memory(device) or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(device)
    return card_named(found.name, found.total_memory)


def empty_cache() -> None:
    """Give freed memory that the allocator holds back to the device.

    What only references to itself keep alive, as the frames of an error may, is freed first.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given, before the host touches managed memory."""
    if has_own_memory(device):
        torch.cuda.synchronize(device)


def prefer_flash(device: torch.device) -> None:
    """Let torch's attention on a GPU be flash or memory-efficient attention, and not cuDNN's.

    On compute capability 9.0 and 10.0 cuDNN's comes first (torch 2.13) and makes a plan for each
    new shape, which takes as long as some steps; batches have many shapes.
    """
    if has_own_memory(device):
        torch.backends.cuda.enable_cudnn_sdp(False)


def allocator_peaks(device: torch.device) -> tuple[int, int]:
    """The most allocated and reserved bytes of a GPU since this was called before."""
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peaks


def describe_device(device: torch.device) -> str:
    """The device in words, with what its peak means."""
    if has_own_memory(device):
        return f"{torch.cuda.get_device_name(device)} (peak: allocated by the process)"
    return "cpu (peak: tensors of loading and of counted steps)"


@dataclass(frozen=True)
class Overhead:
    """What a process takes of a device beside its tensors, and what is left free.

    `fixed` bytes are taken by every process. The margin, for what no plan counts, is `reserve`
    bytes and a `share` of the tensors' peak. One rule for all who ask what fits: tensors, `fixed`
    and margin together are within the budget.
    """

    fixed: int
    reserve: int
    share: float
    source: str

    def margin(self, tensor_bytes: int) -> int:
        """The bytes to leave free where the peak of tensors is `tensor_bytes`."""
        return self.reserve + int(self.share * tensor_bytes)

    def room(self, budget_bytes: int) -> int:
        """The most bytes of tensors that fit into a budget together with the rest."""
        return int((budget_bytes - self.fixed - self.reserve) / (1 + self.share))


OVERHEADS = {
    "cpu": Overhead(0, 0, 0.0, "tensors are counted; the process itself is not part of the plan"),
    "cuda": Overhead(
        450_000_000,
        # cuBLAS keeps a workspace for each thread that multiplies (8 to 32 MiB, in forward and in
        # backward), modules are loaded when a kernel is first called, and the allocator rounds
        # segments up to 20 MiB.
        256_000_000,
        # Holes between blocks of the caching allocator. At 40 settings on cards of 8 to 24 GB
        # (benchmarks/allocator.py) 389 MiB are left at least with expandable segments; without
        # them 7 settings do not fit, which the trial before the first step finds.
        0.05,
        "context and libraries, a common figure for cards of the last years, not measured here; "
        "benchmarks/device_overhead.py measures yours",
    ),
}

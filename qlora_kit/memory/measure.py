"""Bytes that are live, by component, and the peak of the process or the device.

Components are sums over the tensors that a model and an optimizer hold. The peak is the caching
allocator's on CUDA, and the process's resident set, imports and file pages included, on the CPU.
What comes and goes within a step is counted by `memory/counter.py`.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.base.load import tag_weights
from qlora_kit.base.tensors import Tag
from qlora_kit.training.optimizer import tag_states


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the frozen base: `weights_quantized`, `weights_other` and `weights`, their sum."""
    sizes = {"weights_quantized": 0, "weights_other": 0}
    sizes |= held_bytes(lambda tag: tag_weights(model, tag))
    return {**sizes, "weights": sum(sizes.values())}


def adapter_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the adapters' masters, and of the gradients that are there now."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    return {"adapters": tensor_bytes(trained), "gradients": tensor_bytes(gradients)}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the optimizer's states; `paged` are those in managed memory."""
    return {"optimizer": 0, "paged": 0} | held_bytes(lambda tag: tag_states(optimizer, tag))


def held_bytes(hand_over: Callable[[Tag], None]) -> dict[str, int]:
    """Bytes by component of what is handed over, each storage once."""
    sizes: dict[str, int] = {}
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


def peak_bytes(device: torch.device) -> int:
    """The largest number of bytes so far: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where it can be helped: a process inherits that from the one that started it.
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_name(device: torch.device) -> str:
    """What `peak_bytes` are those of."""
    return "tensors" if device.type == "cuda" else "process"


def reserved_bytes(device: torch.device) -> int:
    """The most that the process took from the system: the allocator's blocks, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_bytes(device)


def free_bytes(device: torch.device) -> int:
    """What is left: of the GPU, or of the host within this process's limit."""
    if device.type == "cuda":
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


def describe_device(device: torch.device) -> str:
    """The device in words, with what its peak means."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (peak: allocated by the process)"
    return "cpu (peak: tensors of loading and of counted steps)"

"""Bytes that are live, by component, and the peak of the process or the device.

Components are sums over the tensors that a model and an optimizer hold. The peak is the caching
allocator's on CUDA, and the process's resident set, imports and file pages included, on the CPU.
`StorageCounter` sees every tensor of a step come and go; it slows the step down.
"""

from __future__ import annotations

import contextlib
import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.base.quantize import quantized_bytes


def weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of the frozen base: `weights_quantized`, `weights_other` and `weights`, their sum."""
    quantized = sum(quantized_bytes(module) for module in model.modules())
    counted = {id(p) for m in model.modules() if quantized_bytes(m) for p in m.parameters(False)}
    other = sum(
        tensor_bytes((parameter,))
        for name, parameter in model.named_parameters()
        if id(parameter) not in counted and ".lora_" not in name
    )
    return {
        "weights_quantized": quantized,
        "weights_other": other,
        "weights": quantized + other,
    }


def adapter_bytes(model: Any) -> dict[str, int]:
    """Bytes of the adapters' masters, and of the gradients that are there now."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    return {"adapters": tensor_bytes(trained), "gradients": tensor_bytes(gradients)}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the optimizer's states; `paged` are those in managed memory."""
    sizes = {"optimizer": 0, "paged": 0}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                where = "paged" if getattr(value, "is_paged", False) else "optimizer"
                sizes[where] += tensor_bytes((value,))
    return sizes


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def describe_device(device: torch.device) -> str:
    """The device in words, with what its peak means."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (peak: allocated by the process)"
    return "cpu (peak: resident set of the process, imports included)"


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered, each storage once.

    What `model` holds is there from the beginning. `peak` is the most that was alive at once,
    `before` what was alive when counting began. Bytes inside kernels are not tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, int] = {}
        self.current = self.peak = 0
        self._model = model
        self.before = 0

    def __enter__(self) -> StorageCounter:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._add(tensor)
        self.before = self.current
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._add(value)
        self.peak = max(self.peak, self.current)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.current += storage.nbytes()
        # A storage keeps its Python object for as long as it lives.
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.current -= self._live.pop(key)

"""The CPU as a device that holds so many bytes of tensors and refuses more, as a card does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.memory.counter import StorageCounter


class CappedDevice(StorageCounter):
    """Inside, an operation after which tensors take more than `capacity` bytes fails as torch's do.

    Counted are the tensors that operations have seen. Those of a plan take no memory.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.refused = capacity, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self.current
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.current > self.capacity:
            asked, free = self.current - before, max(0, self.capacity - before)
            self.refused += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {asked} bytes. GPU 0 has a total capacity "
                f"of {self.capacity} bytes of which {free} bytes is free."
            )
        return result

    def _add(self, tensor: Tensor, component: str) -> None:
        if not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
            super()._add(tensor, component)

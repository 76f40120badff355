"""Gradients that wait on the host while a step's passes last.

Where a base is streamed, the device holds two of its layers, and what is as large as they are is
what is trained: masters, their gradients, and states, which bitsandbytes can page. Gradients are
read when all of them are there. So each goes to the host as it comes, is added to by the next
micro-batch on the device, by one add of the same two numbers, and comes back when the passes are
over, where there are no activations any more. No number changes.

Copies are in the stream that computes: none takes as long as a layer does, and nothing has to wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.device.target import device_type, has_own_memory, without_values
from qlora_kit.device.transfer import (
    TO_DEVICE,
    TO_HOST,
    as_host_memory,
    host_memory,
    is_planned,
)
from qlora_kit.training.optimizer import gradient_like


class Waiting:
    """A parameter's gradient on the host, in `held`, between micro-batches (`is_there`)."""

    def __init__(self, parameter: nn.Parameter, held: Tensor) -> None:
        self._held, self.is_there = held, False
        self.hook = parameter.register_post_accumulate_grad_hook(self._leave)  # type: ignore[no-untyped-call]

    def _leave(self, parameter: nn.Parameter) -> None:
        """Backward has left a gradient: it goes, with what was there before."""
        gradient = parameter.grad
        assert gradient is not None
        if self.is_there:
            gradient.add_(self._fetched(gradient))
        if is_planned(gradient):
            without_values(TO_HOST, (gradient,), ())
        else:
            self._held.copy_(gradient, non_blocking=True)
        self.is_there, parameter.grad = True, None

    def come_back(self, parameter: nn.Parameter) -> None:
        """Give the parameter its gradient."""
        if self.is_there:
            parameter.grad = self._fetched(gradient_like(parameter))
            self.is_there = False

    def _fetched(self, like: Tensor) -> Tensor:
        if is_planned(like):
            made = torch.empty_like(like)
            without_values(TO_DEVICE, (made,), ())
            return made
        return torch.empty_like(like).copy_(self._held, non_blocking=True)


def wait_on_host(parameters: Iterable[nn.Parameter], *, anywhere: bool = False) -> None:
    """Let the gradients of trained parameters wait on the host, if that is other memory.

    They wait `anywhere` if asked to. Errors: of torch, where the host has no memory for them.
    """
    trained = [one for one in parameters if one.requires_grad]
    stop_waiting(trained)
    trained = [one for one in trained if anywhere or device_type(one) == "cuda"]
    dtypes = [getattr(one, "grad_dtype", one.dtype) for one in trained]
    sizes = [p.numel() * dtype.itemsize for p, dtype in zip(trained, dtypes, strict=True)]
    size = sum(sizes)
    with as_host_memory():
        locked = any(has_own_memory(one.device) for one in trained)
        block = host_memory(size) if locked else torch.empty(size, dtype=torch.uint8)
    start = 0
    for parameter, dtype, nbytes in zip(trained, dtypes, sizes, strict=True):
        part = block[start : start + nbytes].view(dtype).view(parameter.shape)
        parameter.waiting = Waiting(parameter, part)  # type: ignore[attr-defined]
        start += nbytes


def stop_waiting(parameters: Iterable[nn.Parameter]) -> None:
    """Let gradients stay where backward leaves them."""
    for parameter in parameters:
        if (waiting := waiting_of(parameter)) is not None:
            waiting.hook.remove()
            del parameter.waiting  # type: ignore[attr-defined]


def waiting_of(parameter: Any) -> Waiting | None:
    """How a parameter's gradient waits on the host; None where it does not."""
    return getattr(parameter, "waiting", None)


def come_back(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters the gradients that wait on the host: the passes are over."""
    for parameter in parameters:
        if (waiting := waiting_of(parameter)) is not None:
            waiting.come_back(parameter)


def drop_gradient(parameter: nn.Parameter) -> None:
    """Forget what a part of a step has accumulated, wherever it is."""
    parameter.grad = None
    if (waiting := waiting_of(parameter)) is not None:
        waiting.is_there = False

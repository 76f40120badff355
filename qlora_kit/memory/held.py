"""Bytes that a model and its optimizer hold, by component.

What comes and goes within a step is counted by `memory/counter.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qlora_kit.base.tagged import tag_weights
from qlora_kit.base.tensors import Tag
from qlora_kit.memory.counter import Sizes
from qlora_kit.training.optimizer import tag_states


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

"""Tells a counter where a training step is: in which phase, in which decoder layer.

Hooks on the model and on its layers' outputs say when forward enters a layer and when backward
does. What is made between the last norm and the gradient that comes back to it belongs to the
loss; a gradient that has been accumulated is tagged as one. The hooks keep no tensor alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.decoder import decoder_layers
from qlora_kit.memory.counter import StorageCounter

EMBEDDING, NORM, HEAD = "embedding", "final norm", "head and loss"
"""Modules of a step beside its layers."""


@contextlib.contextmanager
def follow(model: PreTrainedModel, counter: StorageCounter) -> Iterator[None]:
    """Inside, the counter's intervals and what is being filled follow the steps of `model`."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(decoder_layers(model))
    trained = [p for p in model.parameters() if p.requires_grad]

    def enter(phase: str, module: str, filling: str) -> None:
        counter.at(phase, module)
        counter.filling = filling

    def on_gradient(output: Any, module: str, filling: str) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: enter("backward", module, filling)
            )

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output, names[id(layer)], "activations")
        if layer is layers[-1]:
            enter("forward", NORM, "activations")

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output.last_hidden_state, NORM, "activations")
        enter("forward", HEAD, "loss")

    def before_layer(layer: nn.Module, args: Any) -> None:
        enter("forward", names[id(layer)], "activations")

    def before_model(module: nn.Module, args: Any) -> None:
        enter("forward", EMBEDDING, "activations")

    handles = [
        model.base_model.register_forward_pre_hook(before_model),
        model.base_model.register_forward_hook(after_model),
        # First: what other hooks do belongs to the layer that they are on.
        *(layer.register_forward_pre_hook(before_layer, prepend=True) for layer in layers),
        *(layer.register_forward_hook(after_layer, prepend=True) for layer in layers),
        *(
            one.register_post_accumulate_grad_hook(
                lambda p: counter.tag("gradients", (p.grad,)) if p.grad is not None else None
            )
            for one in trained
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""The decoder inside a built model: its layers, what its forward takes, and the mode it is in.

A decoder is found in the model, not in a list of families: its layers are the `nn.ModuleList` that
lies in no other one and has as many members as config.json says, or the most weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.errors import ModelError

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What models and layers take their cache as, and models give it back as: renamed in 5.24."""


def layers_path(model: Any) -> str:
    """The name of the list of decoder layers of `model`, such as `model.layers`.

    Errors: `ModelError` for a model whose decoder is no list of layers.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    count = getattr(model.config, "num_hidden_layers", None)
    of_count = [name for name, module in lists.items() if len(module) == count]
    if not lists:
        raise ModelError(
            f"model_type {model.config.model_type!r}: its decoder is no list of layers",
            "use a model of another family",
        )
    return max(of_count or lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of the text decoder of `model`, in order. Errors: as `layers_path`."""
    layers: nn.ModuleList = model.get_submodule(layers_path(model))
    return layers


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, **more: Any) -> Tensor:
    """What the decoder of `model` gives the head, (B, T, h) in the model's dtype, without a cache.

    `input_ids` and `position_ids` are (B, T); positions are left out where the model takes none.
    Every layer is called with `more`.
    """
    body = model.base_model
    options: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
    taken = {name: value for name, value in options.items() if takes(body, name)}
    hidden: Tensor = body(input_ids=input_ids, **taken, **more).last_hidden_state
    # Mamba's residual is in fp32, and its class casts before the head.
    return hidden.to(computed_in(model))


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., V) of `hidden` (..., h) as training computes them, in fp32."""
    scale, softcap = architecture_of(model.config.model_type).logit_scale_and_softcap(model.config)
    logits: Tensor = model.get_output_embeddings()(hidden).float() * scale
    return logits if softcap is None else (logits / softcap).tanh() * softcap


@contextlib.contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Inside, modules are in training or in evaluation mode; then each is in its own again."""
    others = [module for module in modules if module.training is not training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of a model's class has an argument of that name.

    One that hands whatever it is given to its only part takes what that part takes.
    """
    arguments = _arguments(type(module).forward)
    if arguments == {"self", "args", "kwargs"}:
        return any(takes(part, name) for part in module.children())
    return name in arguments


def settings_of(layer: nn.Module) -> tuple[object, ...]:
    """What a layer runs, weights apart: its modules' classes and their plain settings.

    Layers that differ in nothing but their number have the same.
    """
    return tuple(
        (name, type(module), *sorted(_plain(module)))
        for name, module in layer.named_modules(remove_duplicate=False)
    )


def _plain(module: nn.Module) -> list[tuple[str, str]]:
    if not type(module).__module__.startswith("transformers."):
        return []
    kinds = (bool, int, float, str, type(None), torch.dtype)
    return [
        (name, repr(value))
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name not in ("layer_idx", "layer_id", "layer_number")
    ]


def layer_kind(layer: nn.Module) -> Hashable:
    """What makes a layer the same as another one: code, settings and tensors."""
    named = itertools.chain(layer.named_parameters(), layer.named_buffers())
    tensors = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in named)
    return settings_of(layer), tensors


@contextlib.contextmanager
def only_layers(model: Any, chosen: Sequence[int]) -> Iterator[None]:
    """Let `model` have these of its decoder layers meanwhile, and its config say so."""
    config, path = model.config, layers_path(model)
    owner, _, leaf = path.rpartition(".")
    body = model.get_submodule(owner)
    layers = getattr(body, leaf)
    # What a config has one value of for each layer, such as `layer_types`.
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == len(layers)
    }
    try:
        setattr(body, leaf, nn.ModuleList(layers[i] for i in chosen))
        # An embedding that holds all layers' own parts is cut by this number, and stays whole.
        if not getattr(config, "hidden_size_per_layer_input", None):
            config.num_hidden_layers = len(chosen)
        for name, value in lists.items():
            setattr(config, name, [value[i] for i in chosen])
        yield
    finally:
        setattr(body, leaf, layers)
        config.num_hidden_layers = len(layers)
        for name, value in lists.items():
            setattr(config, name, value)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)

"""Puts adapters into a model, switches between them, and takes them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.load import refuse_saving
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.config.lora import LoRAConfig, is_adapter_name
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.layer import LoRALinear, Masters
from qlora_kit.lora.switch import Switch
from qlora_kit.lora.targets import check_rank, find_targets

ADAPTER = "default"


def inject_lora(
    model: PreTrainedModel,
    config: LoRAConfig | None = None,
    *,
    seed: int = 42,
    adapter: str = ADAPTER,
) -> PreTrainedModel:
    """Put an adapter around every target linear of `model`, in place, and make only it trainable.

    Returns the model. The outputs do not change: B starts at zero. `seed` alone decides A.
    Errors: `ConfigError` for targets that match nothing or a rank that no target can use.
    """
    config = config or LoRAConfig()
    check_name(adapter)
    if config.adapter is not None:
        raise ConfigError(
            f"adapter {config.adapter} is given, and new adapters are to be made",
            "use load_adapter and train_loaded to go on with one",
        )
    targets = find_targets(model, config.target_modules)
    check_rank(model, targets, config.r)
    dtype = _adapter_dtype(model, config)
    clear_adapter(model, adapter)
    switch = switch_of(model)
    # A local random state: drawing adapters leaves the caller's as it was. `manual_seed` of torch
    # itself would reseed the devices' as well, and adapters are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in targets:
            layer = lora_layer(model, name, switch)
            dropout = KeyedDropout(config.dropout, seed, name)
            layer.add_adapter(adapter, config.r, config.scaling, dtype, dropout)
            layer.configs[adapter] = config
    train_only(model, adapter)
    return model


def train_loaded(
    model: PreTrainedModel, config: LoRAConfig, *, seed: int = 42, adapter: str = ADAPTER
) -> PreTrainedModel:
    """Make a loaded adapter of `model` trainable, and only it; its weights are the fp32 masters.

    Dropout and adapter dtype are those of `config`; ranks and scales stay as they were loaded.
    """
    dtype = _adapter_dtype(model, config)
    for name, layer in lora_layers(model).items():
        if adapter in layer.lora_A:
            layer.lora_dropout[adapter] = KeyedDropout(config.dropout, seed, name)
            layer.adapter_dtypes[adapter] = dtype
            layer.configs[adapter] = config
    train_only(model, adapter)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry adapters, by the name of the linear they replaced."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def switch_of(model: nn.Module) -> Switch:
    """The one that the adapted linears of a model read; a new one where there is none yet."""
    return next((layer.switch for layer in lora_layers(model).values()), Switch())


def lora_layer(model: nn.Module, name: str, switch: Switch) -> LoRALinear:
    """The LoRALinear of that name, put around the linear where there is none yet."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    layer = getattr(parent, leaf)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer, switch)
        refuse_saving(model)
        layer.train(parent.training)
        setattr(parent, leaf, layer)
    return layer


def train_only(model: nn.Module, adapter: str) -> None:
    """Make the parameters of one adapter trainable, and nothing else."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        if adapter in layer.lora_A:
            for weight in layer.weights(adapter):
                weight.requires_grad_(True)


def tag_adapters(model: nn.Module, tag: Callable[[str, Iterable[Tensor]], None]) -> None:
    """Hand over the masters of all adapters as `adapters`."""
    tag("adapters", [p for name, p in model.named_parameters() if ".lora_" in name])


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they came."""
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.lora_A))


def active_adapter(model: nn.Module) -> str | None:
    """Which of its own adapters takes part in a model; None is the base alone.

    Errors: `AdapterError` for one that is a bank's.
    """
    active = switch_of(model).active
    if not isinstance(active, Masters | None):
        raise AdapterError(
            f"{active.name!r}, which takes part, is a bank's and not one of the model's own",
            "let the bank use none, or load_adapter it",
        )
    return None if active is None else active.name


def activate(model: nn.Module, adapter: str | None) -> None:
    """Let one adapter take part in every layer that has it; None is the base alone.

    Base weights are not touched. Errors: `AdapterError` for an adapter that the model does not
    have; nothing is changed then.
    """
    if adapter is not None:
        _check_known(model, adapter)
    switch_of(model).active = None if adapter is None else Masters(adapter)


def remove_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Take an adapter out of the model. Errors: `AdapterError` for an unknown or the active one."""
    _check_known(model, adapter)
    if _is_active(model, adapter):
        raise AdapterError(f"adapter {adapter!r} is active", "switch to another one first")
    clear_adapter(model, adapter)


def check_name(adapter: object) -> None:
    """Refuse a name that no adapter can have. Errors: `AdapterError`.

    Adapters are modules by name, and part of the names of their weights: a dot would divide it,
    and a name that the container itself has (`keys`, `forward` ...) is taken.
    """
    if not is_adapter_name(adapter) or hasattr(nn.ModuleDict(), str(adapter)):
        raise AdapterError(
            f"{repr(adapter)[:60]} cannot be the name of an adapter",
            "give letters, digits, - and _, such as my_adapter",
        )


def clear_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Take every trace of an adapter of that name out of the model, if there is one."""
    if _is_active(model, adapter):
        switch_of(model).active = None
    for layer in lora_layers(model).values():
        if adapter in layer.lora_A:
            layer.remove_adapter(adapter)


def _is_active(model: nn.Module, adapter: str) -> bool:
    return switch_of(model).active == Masters(adapter)


def _check_known(model: nn.Module, adapter: str) -> None:
    known = adapter_names(model)
    if adapter not in known:
        raise AdapterError(
            f"the model has no adapter {adapter!r}",
            f"it has {', '.join(known) or 'none: inject or load one first'}",
        )


def _adapter_dtype(model: nn.Module, config: LoRAConfig) -> torch.dtype:
    if config.adapter_dtype != "auto":
        return DTYPES[config.adapter_dtype]
    return computed_in(model)

"""Which linears get an adapter, and the swap.

torch and bitsandbytes, which take seconds to import, are imported by what needs them: PEFT's
config is checked through this module before they are.
"""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.pattern import full_matches

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora_kit.lora.layer import LoRALinear

AUTO_TARGETS = (("q_proj", "v_proj"), ("qkv_proj",))
"""Query and value, or the fused projection where a family has one."""

ADAPTER = "default"
NAME_LIMIT = 200
"""Characters of an adapter's name."""


def inject_lora(
    model: Any, config: LoRAConfig | None = None, *, seed: int = 42, adapter: str = ADAPTER
) -> Any:
    """Put an adapter around every target linear of `model`, in place, and make only it trainable.

    Returns the model. The outputs do not change: B starts at zero. `seed` alone decides A.
    Errors: `ConfigError` for targets that match nothing or a rank that no target can use.
    """
    import torch

    from qlora_kit.lora.layer import KeyedDropout

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
    # A local random state: drawing adapters leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in targets:
            layer = lora_layer(model, name)
            dropout = KeyedDropout(config.dropout, seed, name)
            layer.add_adapter(adapter, config.r, config.scaling, dtype, dropout)
            layer.configs[adapter] = config
    train_only(model, adapter)
    return model


def train_loaded(model: Any, config: LoRAConfig, *, seed: int = 42, adapter: str = ADAPTER) -> Any:
    """Make a loaded adapter of `model` trainable, and only it; its weights are the fp32 masters.

    Dropout and adapter dtype are those of `config`; ranks and scales stay as they were loaded.
    """
    from qlora_kit.lora.layer import KeyedDropout

    dtype = _adapter_dtype(model, config)
    for name, layer in lora_layers(model).items():
        if adapter in layer.lora_A:
            layer.lora_dropout[adapter] = KeyedDropout(config.dropout, seed, name)
            layer.adapter_dtypes[adapter] = dtype
            layer.configs[adapter] = config
    train_only(model, adapter)
    return model


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The names of the linears that `target_modules` asks for, in the model's order.

    `auto`, `all-linear` (every linear but the output head), names (`q_proj` matches
    `model.layers.0.self_attn.q_proj`), or a regex over whole names.
    Errors: `ConfigError` listing the model's linears where a name or the regex matches nothing, or
    naming the head or the embedding where one is asked for.
    """
    candidates = target_candidates(model)
    if target_modules == "all-linear":
        return candidates
    if target_modules == "auto":
        for names in AUTO_TARGETS:
            found = [one for one in candidates if one.rpartition(".")[2] in names]
            if {one.rpartition(".")[2] for one in found} == set(names):
                return found
        raise _no_match("auto", candidates)
    if not isinstance(target_modules, str):
        return targets_by_name(model, target_modules)
    if re.fullmatch(r"[\w.,\- ]+", target_modules):
        asked = [name.strip() for name in target_modules.split(",")]
        return targets_by_name(model, [name for name in asked if name])
    return targets_by_regex(model, target_modules)


def targets_by_name(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The linears whose name is one of `names` or ends in it; each has to match one."""
    candidates = target_candidates(model)
    matches = {
        name: [one for one in candidates if one == name or one.endswith(f".{name}")]
        for name in names
    }
    for end in _ends(model):
        if any(end == name or end.endswith(f".{name}") for name in names):
            raise _refused_end(model, end)
    unmatched = [name for name, found in matches.items() if not found]
    if unmatched or not matches:
        raise _no_match(", ".join(unmatched), candidates)
    chosen = {one for found in matches.values() for one in found}
    return [one for one in candidates if one in chosen]


def targets_by_regex(model: nn.Module, regex: str) -> list[str]:
    """The linears whose whole name matches `regex`."""
    candidates, ends = target_candidates(model), list(_ends(model))
    (matched,) = full_matches([regex], [*ends, *candidates])
    for end in ends:
        if end in matched:
            raise _refused_end(model, end)
    found = [one for one in candidates if one in matched]
    if not found:
        raise _no_match(regex, candidates)
    return found


def target_candidates(model: nn.Module) -> list[str]:
    """Every linear that can carry an adapter: all but the output head."""
    from torch import nn

    from qlora_kit.lora.layer import LoRALinear

    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if (
            isinstance(module, LoRALinear) or (isinstance(module, nn.Linear) and module is not head)
        )
        and not re.search(r"\.(base_layer|lora_[AB]\..*)$", name)
    ]


def short_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The last parts of the names of `targets` where they select just these, else the names."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    chosen = [name for name in target_candidates(model) if name.rpartition(".")[2] in short]
    return short if set(chosen) == set(targets) else list(targets)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry adapters, by the name of the linear they replaced."""
    from qlora_kit.lora.layer import LoRALinear

    return {name: one for name, one in model.named_modules() if isinstance(one, LoRALinear)}


def lora_layer(model: nn.Module, name: str) -> LoRALinear:
    """The LoRALinear of that name, put around the linear where there is none yet."""
    from qlora_kit.lora.layer import LoRALinear

    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    layer = getattr(parent, leaf)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
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
    tag("adapters", [one for name, one in model.named_parameters() if ".lora_" in name])


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they came."""
    return _names(lora_layers(model).values())


def activate(model: nn.Module, adapter: str | None) -> None:
    """Let one adapter take part in every layer that has it; None is the base alone.

    Base weights are not touched. Errors: `AdapterError` for an adapter that the model does not
    have; nothing is changed then.
    """
    layers = lora_layers(model).values()
    if adapter is not None:
        _check_known(adapter, layers)
    for layer in layers:
        layer.active = adapter if adapter is not None and adapter in layer.lora_A else None


def remove_adapter(model: Any, adapter: str) -> None:
    """Take an adapter out of the model. Errors: `AdapterError` for an unknown or the active one."""
    layers = lora_layers(model).values()
    _check_known(adapter, layers)
    if any(layer.active == adapter for layer in layers):
        raise AdapterError(f"adapter {adapter!r} is active", "switch to another one first")
    clear_adapter(model, adapter)


def check_name(adapter: object) -> None:
    """Refuse a name that no adapter can have. Errors: `AdapterError`.

    Adapters are modules by name, and part of the names of their weights: a dot would divide it,
    and a name that the container itself has (`keys`, `forward` ...) is taken.
    """
    from torch import nn

    plain = isinstance(adapter, str) and adapter.isprintable() and len(adapter) <= NAME_LIMIT
    if not plain or not adapter or "." in str(adapter) or hasattr(nn.ModuleDict(), str(adapter)):
        raise AdapterError(
            f"{repr(adapter)[:60]} cannot be the name of an adapter",
            "give letters, digits, - and _, such as my_adapter",
        )


def clear_adapter(model: Any, adapter: str) -> None:
    """Take every trace of an adapter of that name out of the model, if there is one."""
    for layer in lora_layers(model).values():
        if adapter in layer.lora_A:
            layer.remove_adapter(adapter)


def _names(layers: Iterable[LoRALinear]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.lora_A))


def _check_known(adapter: str, layers: Iterable[LoRALinear]) -> None:
    known = _names(layers)
    if adapter not in known:
        raise AdapterError(
            f"the model has no adapter {adapter!r}",
            f"it has {', '.join(known) or 'none: inject or load one first'}",
        )


def _ends(model: Any) -> dict[str, nn.Module]:
    """The output head and the embedding by name: what carries no adapter."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    return {name: one for name, one in model.named_modules() if any(one is end for end in ends)}


def _refused_end(model: Any, name: str) -> ConfigError:
    tied = getattr(model.config, "tie_word_embeddings", False)
    reason = (
        f"the head and the embedding ({', '.join(_ends(model))}) share one tensor, and an update "
        "of one would be merged into both"
        if tied
        else "the head and the embedding stay frozen"
    )
    return ConfigError(
        f"target_modules asks for {name}: {reason}",
        "leave it out; all-linear takes every linear but the head",
    )


def _no_match(asked: str, candidates: Sequence[str]) -> ConfigError:
    counts = collections.Counter(name.rpartition(".")[2] for name in candidates)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return ConfigError(
        f"target_modules {asked!r} matches no linear of this model",
        f"its linears are {listed}",
    )


def check_rank(model: nn.Module, targets: Sequence[str], r: int) -> None:
    """Refuse a rank that no target can use. Errors: `ConfigError`."""
    shapes = {}
    for name in targets:
        layer = model.get_submodule(name)
        shapes[name] = (int(layer.in_features), int(layer.out_features))  # type: ignore[arg-type]
    widest = max(max(shape) for shape in shapes.values())
    narrowest = min(min(shape) for shape in shapes.values())
    if r > widest:
        raise ConfigError(
            f"lora_r {r} is above the largest dimension of every target ({widest})",
            f"give 1 to {narrowest}",
        )
    if r > narrowest:
        warnings.warn(
            f"lora_r {r} is above the smallest dimension of a target ({narrowest}): "
            "its update cannot use that rank",
            stacklevel=3,
        )


def _adapter_dtype(model: nn.Module, config: LoRAConfig) -> torch.dtype:
    from qlora_kit.base.tensors import DTYPES

    if config.adapter_dtype != "auto":
        return DTYPES[config.adapter_dtype]
    return model.get_input_embeddings().weight.dtype  # type: ignore[operator, no-any-return]

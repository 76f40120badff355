"""Which linears get an adapter: by flag, or by PEFT's config.

`auto`, `all-linear`, names or a regex select linears of a model; the output head and the embedding
never. PEFT's config also selects by layer index, leaves out by `exclude_modules`, and gives a rank
and an alpha to each module (`rank_pattern`, `alpha_pattern`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.pattern import full_matches
from qlora_kit.base.recurrence import read_directly
from qlora_kit.base.skipped import by_last_name, small_linears
from qlora_kit.base.text_decoder import names_tower
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.layer import LoRALinear
from qlora_kit.lora.names import OWN, in_class, in_model
from qlora_kit.options.checks import listed_names

QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("att_proj",),
    ("query", "value"),
    ("q_lin", "v_lin"),
)
"""Usual names of the projections of queries and values, in families without a record."""
IN_ADAPTER = re.compile(r"\.(base_layer|lora_[AB]\..*)$")
"""What lies inside a linear that has an adapter."""


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The names of the linears that `target_modules` asks for, in the model's order.

    `auto`, `all-linear` (every linear but the output head and those that the family's record leaves
    out), names (`q_proj` matches `model.layers.0.self_attn.q_proj`), or a regex over whole names.
    Errors: `ConfigError` listing the model's linears where a name or the regex matches nothing, or
    naming the head or the embedding where one is asked for.
    """
    candidates = target_candidates(model)
    if target_modules == "all-linear":
        return all_linear(model)
    if target_modules == "auto":
        return targets_by_name(model, _auto_names(model, candidates))
    if not isinstance(target_modules, str):
        return targets_by_name(model, target_modules)
    names = listed_names(target_modules)
    if names is None:
        return targets_by_regex(model, target_modules)
    return targets_by_name(model, names)


def _auto_names(model: nn.Module, candidates: Sequence[str]) -> tuple[str, ...]:
    """The names of the projections that get an adapter where none are named."""
    record = architecture_of(model.config.model_type)  # type: ignore[union-attr]
    ends = {name.rpartition(".")[2] for name in candidates}
    if record.known:
        # A hybrid may be of one kind of layer alone.
        return tuple(name for name in record.targets if name in ends)
    whole = {name.rpartition(".")[2] for name in all_linear(model)}
    return _usual_names(ends) or tuple(sorted(whole))


def auto_note(model: nn.Module) -> str | None:
    """What to say where `auto` has no names of projections to go by; None where it has."""
    kind = model.config.model_type  # type: ignore[union-attr]
    ends = {name.rpartition(".")[2] for name in target_candidates(model)}
    if architecture_of(kind).known or _usual_names(ends):
        return None
    return (
        f"model_type {kind!r} has no query and value projections of a usual name: auto takes every "
        "linear, as all-linear does, with its memory; --target_modules takes fewer"
    )


def _usual_names(ends: Collection[str]) -> tuple[str, ...]:
    """The first of `QUERY_VALUE` that are all among the last parts of linears' names."""
    return next((names for names in QUERY_VALUE if set(ends).issuperset(names)), ())


def targets_by_name(model: nn.Module, names: Sequence[str], prefix: str = OWN) -> list[str]:
    """The linears whose name is one of `names` or ends in it; each has to match one.

    Names are those of a class that has the decoder under `prefix`; so are the ones returned.
    """
    candidates = [in_class(name, prefix) for name in target_candidates(model)]
    matches = {
        name: {linear for linear in candidates if linear == name or linear.endswith(f".{name}")}
        for name in names
    }
    for end in (in_class(name, prefix) for name in _ends(model)):
        if any(end == name or end.endswith(f".{name}") for name in names):
            raise _refused_end(model, end)
    unmatched = [name for name, linears in matches.items() if not linears]
    if unmatched or not matches:
        raise _no_match(model, ", ".join(unmatched), candidates)
    chosen = set().union(*matches.values())
    return [linear for linear in candidates if linear in chosen]


def targets_by_regex(model: nn.Module, regex: str, prefix: str = OWN) -> list[str]:
    """The linears whose whole name matches `regex`. `prefix` as in `targets_by_name`."""
    candidates, ends = (
        [in_class(name, prefix) for name in names]
        for names in (target_candidates(model), _ends(model))
    )
    (matched,) = full_matches([regex], [*ends, *candidates])
    for end in ends:
        if end in matched:
            raise _refused_end(model, end)
    chosen = [name for name in candidates if name in matched]
    if not chosen:
        raise _no_match(model, regex, candidates)
    return chosen


def all_linear(model: nn.Module) -> list[str]:
    """The linears that `all-linear` stands for, in the model's order."""
    record = architecture_of(model.config.model_type)  # type: ignore[union-attr]
    left_out = {*record.unadapted, *record.unquantized}
    candidates = target_candidates(model)
    sized = {} if record.known else {name: model.get_submodule(name) for name in candidates}
    small = small_linears(sized)
    chosen = [name for name in candidates if name.rpartition(".")[2] not in left_out]
    # Of a model that is small all through, all of them.
    return [name for name in chosen if name not in small] or chosen


def target_candidates(model: nn.Module) -> list[str]:
    """Every linear that can carry an adapter: all but the output head.

    Nor those whose weight the model's own code reads, which would not see an adapter.
    """
    head, read = model.get_output_embeddings(), read_directly(model)  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if (
            isinstance(module, LoRALinear) or (isinstance(module, nn.Linear) and module is not head)
        )
        and name not in read
        and not IN_ADAPTER.search(name)
    ]


def short_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The last parts of the names of `targets` where they select just these, else the names."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    # PEFT looks at every module: `0` is an MLP's linear and also a layer.
    chosen = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in short and not IN_ADAPTER.search(name)
    ]
    return short if set(chosen) == set(targets) else list(targets)


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


def adapted_modules(
    model: PreTrainedModel, config: Mapping[str, Any], path: Path, prefix: str = OWN
) -> dict[str, tuple[int, float]]:
    """The linears of `model` that a checked `config` (of `path`) adapts, with rank and alpha.

    In the model's order, by its own names; the config's are those of a class that has the decoder
    under `prefix`. Errors: `AdapterError` where it asks for what the model does not have.
    """
    targets = config["target_modules"]
    try:
        if isinstance(targets, list):
            names = _in_layers(config, targets_by_name(model, targets, prefix))
        elif targets.lower() == "all-linear":
            names = [in_class(name, prefix) for name in target_candidates(model)]
        else:
            names = targets_by_regex(model, targets, prefix)
        excluded = _excluded(config, names)
        names = [name for name in names if name not in excluded]
        ranks, alphas = (
            _by_pattern(config.get(f"{kind}_pattern") or {}, names) for kind in ("rank", "alpha")
        )
        modules = {
            in_model(name, prefix): (
                int(ranks.get(name, config["r"])),
                float(alphas.get(name, config["lora_alpha"])),
            )
            for name in names
        }
    except ConfigError as error:
        raise AdapterError(
            f"{path}: {error.problem}", f"use its base, or correct it: {error.remedy}"
        ) from error
    if not modules:
        raise AdapterError(f"{path}: selects no linear of this model", "use its base model")
    return modules


def _in_layers(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """PEFT's rule: the first number after a dot, or after one of `layers_pattern`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return names
    chosen = layers if isinstance(layers, list) else [layers]
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    indices: dict[str, str | None] = {}
    for matches in full_matches(
        [patterns] if isinstance(patterns, str) else patterns,
        names,
        r"(?:^|.*?\.){}\.(?P<index>\d+)\..*",
    ):
        indices = {name: groups["index"] for name, groups in matches.items()} | indices
    selected = {name for name, index in indices.items() if int(str(index)) in chosen}
    return [name for name in names if name in selected or name in config["target_modules"]]


def _excluded(config: Mapping[str, Any], names: list[str]) -> set[str]:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return set(full_matches([excluded], names)[0])
    return {name for name in names for end in excluded if name == end or name.endswith(f".{end}")}


def _by_pattern(pattern: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """The value of the first key that matches the end of a name, as PEFT looks it up."""
    values: dict[str, float] = {}
    matches = full_matches(list(pattern), names, r"(.*\.)?({})")
    for value, matched in zip(pattern.values(), matches, strict=True):
        values = dict.fromkeys(matched, value) | values
    return values


def _ends(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The output head and the embedding by name: what carries no adapter."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    modules = model.named_modules()
    return {name: module for name, module in modules if any(module is end for end in ends)}


def _refused_end(model: PreTrainedModel, name: str) -> ConfigError:
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


def _no_match(model: nn.Module, asked: str, candidates: Sequence[str]) -> ConfigError:
    left_out = ""
    if names_tower(asked):
        left_out = ": towers for other input than text are left out, and carry no adapter"
    ends = {name.rpartition(".")[2] for name in read_directly(model)}
    if own := sorted(end for end in ends if re.search(rf"\b{end}\b", asked)):
        left_out = f" that takes an adapter: its own code reads the weight of {', '.join(own)}"
    if re.sub("[^a-z]", "", asked.lower()) in ("all", "alllinear", "alllinears", "linear"):
        left_out = ", did you mean all-linear?"
    return ConfigError(
        f"target_modules {asked!r} matches no linear of this model{left_out}",
        f"its linears are {by_last_name(candidates)}",
    )

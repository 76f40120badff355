"""PEFT's `adapter_config.json`: what of it is supported, and which modules it means.

Plain LoRA on linear layers, with a rank and an alpha for each module (`rank_pattern`,
`alpha_pattern`), chosen by name, regex, `all-linear`, layer index, and left out by
`exclude_modules`. Whatever else is set is refused by name and never ignored: it would change the
arithmetic, or the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base.contents import BESIDE_AN_ADAPTER, find
from qlora_kit.base.json_file import read_json
from qlora_kit.config.limits import LARGEST_ALPHA, LARGEST_RANK
from qlora_kit.errors import AdapterError, ConfigError, UnsafeInputError
from qlora_kit.lora.inject import target_candidates, targets_by_name, targets_by_regex
from qlora_kit.lora.pattern import full_matches

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}
WITHOUT_EFFECT = {
    # Names and settings that do not change what a saved plain adapter computes.
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "eva_config",
}
NAMES_LIMIT = 10_000
"""Names, patterns or layers of one option: each is compared with every linear of a model."""
TEXT_LIMIT = 4096
"""Characters of a name: a path has no more."""

UNUSED: tuple[Any, ...] = (None, False, "none", [], {})
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; others (pissa ...) change it."""


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked `adapter_config.json` of a directory that also holds the weights.

    Errors: `AdapterError` naming what is missing or not supported, `UnsafeInputError` for pickles.
    """
    path = Path(directory)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such directory", "give the directory of a saved adapter")
    where = find(path, CONFIG_FILE, AdapterError)
    if where is None:
        raise AdapterError(f"{path}: holds no {CONFIG_FILE}", "give the directory of an adapter")
    config = read_json(where, AdapterError)
    if find(path, WEIGHTS_FILE, AdapterError) is None:
        if os.path.lexists(path / "adapter_model.bin"):
            raise UnsafeInputError(
                f"{path / 'adapter_model.bin'}: is a pickle, which can run code when it is read",
                f"convert it to {WEIGHTS_FILE} where you trust it",
            )
        raise AdapterError(f"{path}: holds no {WEIGHTS_FILE}", "complete the adapter's directory")
    for name in BESIDE_AN_ADAPTER:
        find(path, name, AdapterError)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported", "use a LoRA adapter"
        )
    for option, value in config.items():
        known = option in READ or option in WITHOUT_EFFECT
        changes_base = option == "init_lora_weights" and value not in PLAIN_STARTS
        if changes_base or not (known or value in UNUSED):
            raise AdapterError(
                f"{where}: {option} {repr(value)[:100]} is not supported", "use plain LoRA"
            )
    for problem in _problems(config):
        raise AdapterError(f"{where}: {problem}", "correct the file, or save the adapter again")
    return config


def _problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of the options that are read."""
    problems = []
    ranks, alphas = (config.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha"))
    if not _is_rank(config.get("r")):
        problems.append(
            f"r must be at least 1 and at most {LARGEST_RANK}, got {repr(config.get('r'))[:60]}"
        )
    if not _is_alpha(config.get("lora_alpha")):
        problems.append(f"lora_alpha must be above 0, got {repr(config.get('lora_alpha'))[:60]}")
    dropout = config.get("lora_dropout") or 0.0
    if not (_is_number(dropout) and 0 <= dropout < 1):
        problems.append(f"lora_dropout must be at least 0 and below 1, got {dropout!r}")
    if not isinstance(config.get("use_rslora", False), bool):
        problems.append(f"use_rslora must be true or false, got {config['use_rslora']!r}")
    if not (isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))):
        problems.append(f"rank_pattern must map names to ranks, got {str(ranks)[:100]}")
    if not (isinstance(alphas, dict) and all(map(_is_alpha, alphas.values()))):
        problems.append(f"alpha_pattern must map names to alphas, got {str(alphas)[:100]}")
    if not (config.get("target_modules") and _is_names(config["target_modules"])):
        problems.append(f"target_modules is {str(config.get('target_modules'))[:100]}")
    for option in ("base_model_name_or_path", "revision"):
        if not _is_name(config.get(option)):
            problems.append(f"{option} must be a name, got {repr(config[option])[:100]}")
    for option in ("exclude_modules", "layers_pattern"):
        if not _is_names(config.get(option) or []):
            problems.append(f"{option} is {str(config[option])[:100]}")
    layers = config.get("layers_to_transform")
    indices = layers if isinstance(layers, list) else [0 if layers is None else layers]
    if len(indices) > NAMES_LIMIT or not all(type(index) is int for index in indices):
        problems.append(f"layers_to_transform is {str(layers)[:100]}")
    if layers is not None and isinstance(config.get("target_modules"), str):
        problems.append("layers_to_transform needs target_modules to be a list")
    return problems


def _is_name(value: Any) -> bool:
    """A text that may be a path or a hub id, or null."""
    return value is None or (
        isinstance(value, str) and len(value) <= TEXT_LIMIT and "\0" not in value
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list)
        and len(value) <= NAMES_LIMIT
        and all(isinstance(name, str) for name in value)
    )


def _is_number(value: Any) -> bool:
    # A whole number of JSON may be too large for a float, and NaN is not below anything.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST_ALPHA


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0


def adapted_modules(
    model: Any, config: Mapping[str, Any], path: Path
) -> dict[str, tuple[int, float]]:
    """The linears of `model` that a checked `config` (of `path`) adapts, with rank and alpha.

    In the model's order. Errors: `AdapterError` where it asks for what the model does not have.
    """
    targets = config["target_modules"]
    try:
        if isinstance(targets, list):
            names = _in_layers(config, targets_by_name(model, targets))
        elif targets.lower() == "all-linear":
            names = target_candidates(model)
        else:
            names = targets_by_regex(model, targets)
        excluded = _excluded(config, names)
        names = [name for name in names if name not in excluded]
        ranks, alphas = (
            _by_pattern(config.get(f"{kind}_pattern") or {}, names) for kind in ("rank", "alpha")
        )
        modules = {
            name: (
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
    found: dict[str, str | None] = {}
    for matches in full_matches(
        [patterns] if isinstance(patterns, str) else patterns,
        names,
        r"(?:^|.*?\.){}\.(?P<index>\d+)\..*",
    ):
        found = {name: groups["index"] for name, groups in matches.items()} | found
    selected = {name for name, index in found.items() if int(str(index)) in chosen}
    return [name for name in names if name in selected or name in config["target_modules"]]


def _excluded(config: Mapping[str, Any], names: list[str]) -> set[str]:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return set(full_matches([excluded], names)[0])
    return {name for name in names for one in excluded if name == one or name.endswith(f".{one}")}


def _by_pattern(pattern: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """The value of the first key that matches the end of a name, as PEFT looks it up."""
    values: dict[str, float] = {}
    matches = full_matches(list(pattern), names, r"(.*\.)?({})")
    for value, matched in zip(pattern.values(), matches, strict=True):
        values = dict.fromkeys(matched, value) | values
    return values

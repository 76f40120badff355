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
from qlora_kit.errors import AdapterError, UnsafeInputError

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

SHOWN = 3
"""Folders that are named in place of the one that is given."""

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
        # PEFT saves an adapter that has a name into a folder of that name.
        inside = sorted(str(one.parent) for one in path.glob(f"*/{CONFIG_FILE}"))[:SHOWN]
        remedy = f"give {' or '.join(inside)}" if inside else "give the directory of an adapter"
        raise AdapterError(f"{path}: holds no {CONFIG_FILE}", remedy)
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

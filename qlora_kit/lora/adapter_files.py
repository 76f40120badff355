"""The files of an adapter, each opened once: PEFT's config, and the header of the weights.

Supported is plain LoRA on linear layers, with a rank and an alpha for each module (`rank_pattern`,
`alpha_pattern`), chosen by name, regex, `all-linear`, layer index, and left out by
`exclude_modules`. Whatever else is set is refused by name and never ignored: it would change the
arithmetic, or the base.

The header also says what the adapter was trained on, where a run of ours saved it. Nothing here
needs torch, so that what paths, JSON and headers show is refused before it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.contents import BESIDE_AN_ADAPTER, find
from qlora_kit.base.json_file import is_deep, read_json
from qlora_kit.base.safetensors_file import TensorEntry, read_whole_header
from qlora_kit.base.source import contained
from qlora_kit.errors import AdapterError, UnsafeInputError
from qlora_kit.files.atomic import write_file
from qlora_kit.files.opened import OpenFiles
from qlora_kit.options.checks import LARGEST_ALPHA, LARGEST_RANK

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


HEADER_KEY = "qlora_kit"
TRAINED_ON: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "revision": str,
    "fingerprint": str,
    "parameters": int,
    "bits": int,
    "quant_type": str,
    "double_quant": bool,
    "blocksize": int,
    "source_dtype": str,
    "compute_dtype": str,
    "embedding_rows": int,
    "skip_modules": (str, list),
    "head_bits": int,
    "lora": dict,
    "wrapper": str,
    "adapter_keys": str,
    "row_format": str,
}


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's files say; `trained_on` is empty for one of PEFT's own, which says nothing.

    `entries` are the tensors of `weights`. `sha256` is that of the whole file of weights, where it
    was asked for.
    """

    directory: Path
    config: Mapping[str, Any]
    weights: Path
    entries: Mapping[str, TensorEntry]
    trained_on: Mapping[str, Any]
    sha256: str | None = None

    @property
    def described_in(self) -> Path:
        """Where `config` was read."""
        return self.weights.parent / CONFIG_FILE


def write_adapter(
    directory: str | os.PathLike[str], weights: bytes, config: Mapping[str, Any]
) -> None:
    """Write an adapter's files into `directory`, which is made where it does not exist."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / WEIGHTS_FILE, weights)
    write_file(target / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def read_adapter(directory: str | os.PathLike[str], *, hashed: bool = False) -> AdapterFiles:
    """Open an adapter's files. Errors: `AdapterError`, `UnsafeInputError`."""
    config = read_adapter_config(directory)
    path = contained(Path(directory), WEIGHTS_FILE, AdapterError)
    with OpenFiles() as files:
        entries, metadata = read_whole_header(path, AdapterError, files)
        said = _trained_on(metadata.get(HEADER_KEY, "{}"), path)
        file = files.open(path)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hashed else None
    return AdapterFiles(Path(directory), config, path, entries, said, sha256)


def _trained_on(text: Any, path: Path) -> dict[str, Any]:
    """What the header's JSON says of the base. Errors: `AdapterError`."""
    try:
        said = dict(json.loads(text))
        if is_deep(said):
            raise ValueError("nested too deeply")
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path}: the header's {HEADER_KEY} is no JSON object", "save the adapter again"
        ) from error
    known = {option: said[option] for option in TRAINED_ON if option in said}
    for option, value in known.items():
        if value is not None and not isinstance(value, TRAINED_ON[option]):
            raise AdapterError(
                f"{path}: the header's {HEADER_KEY} says {option} {str(value)[:60]!r}",
                "save the adapter again",
            )
    return known

"""One adapter to PEFT's two files, and back.

`adapter_config.json` is plainly PEFT's. The header of `adapter_model.safetensors` also carries
one JSON string, `qlora_kit`, that says what the adapter was trained on: bits, format, dtypes, name
and fingerprint of the base. PEFT ignores it; an adapter without it (PEFT's own) is accepted.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.load import check_finite, read_tensors
from qlora_kit.base.source import contained
from qlora_kit.base.validate import read_header, read_json
from qlora_kit.config import LoRAConfig
from qlora_kit.errors import AdapterError, ConfigError, UnsafeInputError
from qlora_kit.files import write_file
from qlora_kit.lora.inject import (
    ADAPTER,
    activate,
    find_targets,
    lora_layer,
    lora_layers,
    target_candidates,
)
from qlora_kit.lora.layer import KeyedDropout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEADER_KEY = "qlora_kit"
KEY_PREFIX = "base_model.model."
UNSUPPORTED = {
    # PEFT's options that change the arithmetic, with the value that means "not used".
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "megatron_config": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}


def save_adapter(model: Any, directory: str | os.PathLike[str], adapter: str = ADAPTER) -> None:
    """Write an adapter of `model` into `directory`, which is made where it does not exist.

    Weights are in the adapter dtype. Errors: `NumericError` for an adapter with a value that is
    not finite (nothing is written), `AdapterError` where the model has no such adapter.
    """
    from safetensors.torch import save

    tensors = adapter_tensors(model, adapter)
    if not tensors:
        raise AdapterError(f"the model has no adapter {adapter!r}", "inject or load one first")
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    info = model.base_info.as_dict() if hasattr(model, "base_info") else {}
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    content = save(tensors, {"format": "pt", HEADER_KEY: json.dumps(info)})
    write_file(target / WEIGHTS_FILE, content)
    described = json.dumps(adapter_config(model, adapter), indent=2) + "\n"
    write_file(target / CONFIG_FILE, described.encode())


def adapter_tensors(model: Any, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """PEFT's keys to the adapter's weights on the CPU, in the adapter dtype."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        if adapter in layer.lora_A:
            dtype = layer.adapter_dtypes[adapter]
            for part, weight in zip("AB", layer.weights(adapter), strict=True):
                key = f"{KEY_PREFIX}{name}.lora_{part}.weight"
                tensors[key] = weight.detach().to("cpu", dtype).contiguous()
    return tensors


def adapter_config(model: Any, adapter: str = ADAPTER) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of it."""
    config: LoRAConfig = model.lora_configs[adapter]
    alpha = config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "revision": model.base_info.revision if hasattr(model, "base_info") else None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        "target_modules": _peft_targets(model, adapter),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _peft_targets(model: Any, adapter: str) -> list[str]:
    """Last parts of the names where they select just these layers, else the whole names."""
    adapted = [name for name, layer in lora_layers(model).items() if adapter in layer.lora_A]
    short = sorted({name.rpartition(".")[2] for name in adapted})
    selected = [name for name in target_candidates(model) if name.rpartition(".")[2] in short]
    return short if selected == adapted else adapted


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked `adapter_config.json` of a directory.

    Errors: `AdapterError` naming what is missing or not supported, `UnsafeInputError` for pickles.
    """
    path = Path(directory)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such directory", "give the directory of a saved adapter")
    if not (path / CONFIG_FILE).exists():
        raise AdapterError(f"{path}: holds no {CONFIG_FILE}", "give the directory of an adapter")
    config = read_json(contained(path, CONFIG_FILE), AdapterError)
    where = path / CONFIG_FILE
    if not (path / WEIGHTS_FILE).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsafeInputError(
                f"{path / 'adapter_model.bin'}: is a pickle, which can run code when it is read",
                f"convert it to {WEIGHTS_FILE} where you trust it",
            )
        raise AdapterError(f"{path}: holds no {WEIGHTS_FILE}", "complete the adapter's directory")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported", "use a LoRA adapter"
        )
    for option, unused in UNSUPPORTED.items():
        value = config.get(option)
        if value not in (None, unused, [], {}):
            raise AdapterError(
                f"{where}: {option} {value!r} is not supported", "use a plain LoRA adapter"
            )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise AdapterError(f"{where}: r must be at least 1, got {r!r}", "correct the file")
    if not isinstance(alpha, (int, float)) or not (0 < alpha < math.inf):
        raise AdapterError(f"{where}: lora_alpha must be above 0, got {alpha!r}", "correct it")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise AdapterError(f"{where}: target_modules is {targets!r}", "name the adapted modules")
    return config


def trained_on(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter's header says of its base; empty for one that does not say (PEFT's)."""
    path = contained(Path(directory), WEIGHTS_FILE)
    read_header(path, AdapterError)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    try:
        said = json.loads(header.get("__metadata__", {}).get(HEADER_KEY, "{}"))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{path}: the header's {HEADER_KEY} is not JSON", "save the adapter again"
        ) from error
    return said if isinstance(said, dict) else {}


def load_adapter(
    model: Any,
    directory: str | os.PathLike[str],
    adapter: str = ADAPTER,
    *,
    allow_other_base: bool = False,
    seed: int = 42,
) -> Any:
    """Add the adapter in `directory` (ours or PEFT's) to `model`, and make it the active one.

    Returns the model; nothing is trainable. Everything is checked before the model is touched.
    Errors: `AdapterError` where files, shapes, targets or the base do not fit, `NumericError`.
    """
    config = read_adapter_config(directory)
    path = contained(Path(directory), WEIGHTS_FILE)
    entries = read_header(path, AdapterError)
    said = trained_on(directory)
    _check_base(model, said, path, allow_other_base)
    expected = _expected(model, config, path)
    _check_tensors({name: entry.shape for name, entry in entries.items()}, expected, path)
    dtypes = {entry.torch_dtype for entry in entries.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise AdapterError(f"{path}: holds {sorted(map(str, dtypes))}", "save it in one dtype")
    tensors = {name: tensor.float().clone() for name, tensor in read_tensors(entries)}
    lora = LoRAConfig(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=config["target_modules"]
        if isinstance(config["target_modules"], str)
        else tuple(config["target_modules"]),
        use_rslora=bool(config.get("use_rslora")),
        adapter_dtype=_dtype_option(next(iter(dtypes))),
    )
    dtype = next(iter(dtypes))
    for name in _module_names(expected):
        layer = lora_layer(model, name)
        if adapter in layer.lora_A:
            layer.remove_adapter(adapter)
        with torch.random.fork_rng(devices=[]):
            dropout = KeyedDropout(lora.dropout, seed, name)
            layer.add_adapter(adapter, lora.r, lora.scaling, dtype, dropout)
        for part, weight in zip("AB", layer.weights(adapter), strict=True):
            weight.data.copy_(tensors[f"{KEY_PREFIX}{name}.lora_{part}.weight"])
            weight.requires_grad_(False)
    if all(not t.any() for name, t in tensors.items() if name.endswith("lora_B.weight")):
        warnings.warn(f"{path}: every lora_B is zero: the adapter has no effect", stacklevel=2)
    model.lora_configs = {**getattr(model, "lora_configs", {}), adapter: lora}
    activate(model, adapter)
    return model


def _check_base(model: Any, said: Mapping[str, Any], path: Path, allow_other_base: bool) -> None:
    mine = getattr(model, "base_info", None)
    if mine is None or not said.get("fingerprint") or allow_other_base:
        return
    if said["fingerprint"] != mine.fingerprint:
        raise AdapterError(
            f"{path}: was trained on {said.get('name')} with other weights than {mine.name}",
            "give the base that it was trained on, or --allow_other_base",
        )


def _expected(model: Any, config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that the config asks for on this model."""
    try:
        targets = find_targets(model, config["target_modules"])
    except ConfigError as error:
        raise AdapterError(
            f"{path.parent / CONFIG_FILE}: {error.problem}", f"use its base model: {error.remedy}"
        ) from error
    expected: dict[str, tuple[int, ...]] = {}
    for name in targets:
        layer = model.get_submodule(name)
        expected[f"{KEY_PREFIX}{name}.lora_A.weight"] = (config["r"], layer.in_features)
        expected[f"{KEY_PREFIX}{name}.lora_B.weight"] = (layer.out_features, config["r"])
    return expected


def _check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if missing or surplus:
        parts = []
        if missing:
            parts.append(
                f"lacks {len(missing)} tensors that its config asks for ({missing[0]} ...)"
            )
        if surplus:
            parts.append(f"holds {len(surplus)} that it does not ask for ({surplus[0]} ...)")
        raise AdapterError(
            f"{path}: {'; '.join(parts)}", "use the base and config that belong to the adapter"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise AdapterError(
                f"{path}: {name} is {list(found[name])}, expected {list(shape)}",
                "use the base and the r that belong to the adapter",
            )


def _module_names(expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    suffix = ".lora_A.weight"
    return [k.removeprefix(KEY_PREFIX).removesuffix(suffix) for k in expected if k.endswith(suffix)]


def _dtype_option(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")

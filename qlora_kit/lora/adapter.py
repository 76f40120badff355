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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.base import Base, BaseInfo
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.base.tensors import check_finite, read_tensors
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter_files import HEADER_KEY, AdapterFiles, read_adapter, write_adapter
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.inject import (
    ADAPTER,
    activate,
    check_name,
    clear_adapter,
    lora_layer,
    lora_layers,
)
from qlora_kit.lora.names import OWN, in_class, module_key, prefix_of, prefix_to_save
from qlora_kit.lora.targets import adapted_modules, short_names

SCALE_OPTIONS = ("r", "lora_alpha", "use_rslora")
"""What the header repeats of the config: a changed one scales the update, and no shape shows it."""


def save_adapter(
    base: Base,
    directory: str | os.PathLike[str],
    adapter: str = ADAPTER,
    other: tuple[str, BaseInfo] | None = None,
) -> None:
    """Write an adapter of `base.model` into `directory`, which is made where it does not exist.

    Weights are in the adapter dtype. `other`: a text model of the same weights to load it on, its
    name and what is said of it. Errors: `NumericError` for an adapter with a value that is not
    finite (nothing is written), `AdapterError` where the model has no such adapter.
    """
    prefix = OWN if other else _prefix(base, adapter)
    tensors = adapter_tensors(base.model, adapter, prefix)
    if not tensors:
        raise AdapterError(f"the model has no adapter {adapter!r}", "inject or load one first")
    for name, tensor in tensors.items():
        check_finite(tensor, name, "train it again, with a lower --learning_rate or weight decay")
    described = adapter_config(base, adapter, prefix)
    if other:
        described |= {"base_model_name_or_path": other[0], "revision": other[1].revision}
    info = (other[1] if other else base.info).as_dict()
    info["lora"] = {option: described[option] for option in SCALE_OPTIONS}
    if base.wrapper is not None and not other:
        info["wrapper"] = base.wrapper.model_type
        info["adapter_keys"] = "text" if prefix == OWN else "wrapper"
    content = _in_order(save(tensors, {"format": "pt", HEADER_KEY: json.dumps(info)}))
    write_adapter(directory, content, described)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: safetensors 0.8 writes it in a random one."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _prefix(base: Base, adapter: str) -> str:
    """What the decoder's names begin with in the files of an adapter."""
    configs = (one.configs.get(adapter) for one in lora_layers(base.model).values())
    keys = next((config.adapter_keys for config in configs if config is not None), None)
    return prefix_to_save(base, keys)


def adapter_tensors(
    model: PreTrainedModel, adapter: str = ADAPTER, prefix: str = OWN
) -> dict[str, Tensor]:
    """PEFT's keys to the adapter's weights on the CPU, in the adapter dtype.

    `prefix` is what the decoder's names begin with in the file.
    """
    tensors = {}
    for name, layer in lora_layers(model).items():
        if adapter in layer.lora_A:
            dtype = layer.adapter_dtypes[adapter]
            for part, weight in zip("AB", layer.weights(adapter), strict=True):
                tensors[module_key(name, part, prefix)] = (
                    weight.detach().to("cpu", dtype).contiguous()
                )
    return tensors


def adapter_config(base: Base, adapter: str, prefix: str) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of it, the decoder's names beginning with `prefix`."""
    layers = lora_layers(base.model).items()
    adapted = {name: layer for name, layer in layers if adapter in layer.lora_A}
    config = next(iter(adapted.values())).configs[adapter]
    # Towers have modules of the same short names, which PEFT would adapt too.
    targets = [in_class(name, prefix) for name in adapted]
    if prefix == OWN:
        targets = short_names(base.model, list(adapted))
    ranks, alphas = {}, {}
    for name, layer in ((in_class(name, prefix), layer) for name, layer in adapted.items()):
        r = layer.weights(adapter)[0].shape[0]
        alpha = layer.scaling[adapter] * (math.sqrt(r) if config.use_rslora else r)
        if r != config.r:
            ranks[name] = r
        if not math.isclose(alpha, config.alpha, rel_tol=1e-9):
            alphas[name] = _plain(round(alpha, 9))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source.reference,
        "revision": base.info.revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def load_adapter(
    base: Base,
    directory: AdapterFiles | str | os.PathLike[str],
    adapter: str = ADAPTER,
    *,
    allow_other_base: bool = False,
    seed: int = 42,
) -> Base:
    """Add the adapter in `directory` (ours or PEFT's) to `base.model`, and make it the active one.

    Files that were opened already are not opened again for their headers.
    Returns the base; nothing is trainable. Everything is checked before the model is touched.
    Errors: `AdapterError` where files, shapes, targets or the base do not fit, `NumericError`.
    """
    check_name(adapter)
    model = base.model
    path, config, entries, modules, dtype, prefix = open_adapter(
        model, directory, None if allow_other_base else base.info
    )
    tensors = {name: tensor.float().clone() for name, tensor in read_tensors(entries)}
    targets = config["target_modules"]
    lora = LoRAConfig(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora")),
        adapter_dtype=next(name for name, known in DTYPES.items() if known is dtype),
        adapter_keys=None if base.wrapper is None else "text" if prefix == OWN else "wrapper",
    )
    clear_adapter(model, adapter)
    for name, (r, alpha) in modules.items():
        layer = lora_layer(model, name)
        scaling = replace(lora, r=r, alpha=alpha).scaling
        with torch.random.fork_rng(devices=[]):
            dropout = KeyedDropout(lora.dropout, seed, name)
            layer.add_adapter(adapter, r, scaling, dtype, dropout)
        layer.configs[adapter] = lora
        for part, weight in zip("AB", layer.weights(adapter), strict=True):
            weight.data.copy_(tensors[module_key(name, part, prefix)])
            weight.requires_grad_(False)
    if all(not t.any() for name, t in tensors.items() if name.endswith("lora_B.weight")):
        warnings.warn(f"{path}: every lora_B is zero: the adapter has no effect", stacklevel=2)
    activate(model, adapter)
    return base


class OpenAdapter(NamedTuple):
    """An adapter whose files were checked against a model, before its weights are read."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    modules: dict[str, tuple[int, float]]
    """Rank and alpha of each linear that it adapts."""
    dtype: torch.dtype
    prefix: str
    """What the decoder's names begin with in the files."""


def open_adapter(
    model: PreTrainedModel, files: AdapterFiles | str | os.PathLike[str], base: BaseInfo | None
) -> OpenAdapter:
    """Check an adapter's files against `model`, which may still be on the meta device.

    `base` says what the model is; None takes any that has the same shapes.
    Errors: `AdapterError` where files, shapes, targets or the base do not fit.
    """
    if not isinstance(files, AdapterFiles):
        files = read_adapter(files)
    path, config, entries = files.weights, files.config, files.entries
    _check_base(base, files.trained_on, path)
    _check_scale(config, files.trained_on, files.described_in)
    prefix = prefix_of(model, entries, path)
    modules = adapted_modules(model, config, files.described_in, prefix)
    expected = _expected(model, modules, prefix)
    _check_tensors({name: entry.shape for name, entry in entries.items()}, expected, path)
    dtypes = {entry.torch_dtype for entry in entries.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise AdapterError(
            f"{path}: holds {', '.join(sorted(map(str, dtypes)))}", "save it in bf16, fp16 or fp32"
        )
    return OpenAdapter(path, config, entries, modules, dtypes.pop(), prefix)


def _check_base(base: BaseInfo | None, said: Mapping[str, Any], path: Path) -> None:
    if base is None or not said.get("fingerprint"):
        return
    if said["fingerprint"] != base.fingerprint:
        raise AdapterError(
            f"{path}: was trained on {said.get('name')} with other weights than {base.name}",
            "give the base that it was trained on, or --allow_other_base",
        )
    if said.get("embedding_rows") != base.embedding_rows:
        shown = [
            rows or "the base's own" for rows in (said.get("embedding_rows"), base.embedding_rows)
        ]
        raise AdapterError(
            f"{path}: was trained with {shown[0]} embedding rows, and here are {shown[1]}",
            "use the tokenizer that it was trained with, or --allow_other_base",
        )


def _check_scale(config: Mapping[str, Any], said: Mapping[str, Any], where: Path) -> None:
    """Refuse a config whose rank or scale is not the one that the weights were saved with."""
    for option, saved in said.get("lora", {}).items():
        if option in SCALE_OPTIONS and config.get(option, False) != saved:
            raise AdapterError(
                f"{where}: {option} is {config.get(option)!r}, and the weights were saved with "
                f"{saved!r}",
                "restore the file",
            )


def _expected(
    model: PreTrainedModel, modules: Mapping[str, tuple[int, float]], prefix: str
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the tensors of an adapter on these modules."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, (r, _) in modules.items():
        layer = model.get_submodule(name)
        expected[module_key(name, "A", prefix)] = (r, layer.in_features)
        expected[module_key(name, "B", prefix)] = (layer.out_features, r)
    return expected


def _check_tensors(
    present: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    missing, surplus = sorted(expected.keys() - present), sorted(present.keys() - expected.keys())
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
        if present[name] != shape:
            raise AdapterError(
                f"{path}: {name} is {list(present[name])}, expected {list(shape)}",
                "use the base and the r that belong to the adapter",
            )

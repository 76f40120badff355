"""One adapter to PEFT's two files, and back.

`adapter_config.json` is plainly PEFT's. The header of `adapter_model.safetensors` also carries
one JSON string, `qlora_kit`, that says what the adapter was trained on: bits, format, dtypes, name
and fingerprint of the base. PEFT ignores it; an adapter without it (PEFT's own) is accepted.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.base import Base, BaseInfo
from qlora_kit.base.tensors import check_finite
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter_files import HEADER_KEY, AdapterFiles, write_adapter
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.inject import (
    ADAPTER,
    activate,
    check_name,
    clear_adapter,
    lora_layer,
    lora_layers,
    switch_of,
)
from qlora_kit.lora.names import OWN, in_class, module_key
from qlora_kit.lora.opening import SCALE_OPTIONS, open_adapter
from qlora_kit.lora.targets import short_names


def save_adapter(
    base: Base,
    directory: str | os.PathLike[str],
    adapter: str = ADAPTER,
    other: tuple[str, BaseInfo] | None = None,
    row_format: str | None = None,
) -> None:
    """Write an adapter of `base.model` into `directory`, which is made where it does not exist.

    Weights are in the adapter dtype. `other`: a text model of the same weights to load it on, its
    name and what is said of it. `row_format` is the shape of the rows that it was trained on.
    Errors: `NumericError` for an adapter with a value that is not finite (nothing is written),
    `AdapterError` where the model has no such adapter.
    """
    prefix = OWN if other else prefix_to_save(base, adapter)
    tensors = adapter_tensors(base.model, adapter, prefix)
    if not tensors:
        raise AdapterError(f"the model has no adapter {adapter!r}", "inject or load one first")
    for name, tensor in tensors.items():
        check_finite(tensor, name, "train it again, with a lower --learning_rate or weight decay")
    described = adapter_config(base, adapter, prefix)
    if other:
        described |= {"base_model_name_or_path": other[0], "revision": other[1].revision}
    info = (other[1] if other else base.info).as_dict()
    if row_format is not None:
        info["row_format"] = row_format
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


def prefix_to_save(base: Base, adapter: str) -> str:
    """What the decoder's names begin with in the files of an adapter, by its `--adapter_keys`.

    A text model has its own names. Those of a multimodal class are taken where none are chosen.
    """
    configs = (one.configs.get(adapter) for one in lora_layers(base.model).values())
    keys = next((config.adapter_keys for config in configs if config is not None), None)
    if base.wrapper is None or keys == "text":
        return OWN
    return f"{base.wrapper.decoder}."


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
    opened = open_adapter(model, directory, None if allow_other_base else base.info)
    masters = opened.read(dtype=torch.float32)
    config, dtype, targets = opened.config, opened.dtype, opened.config["target_modules"]
    lora = LoRAConfig(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora")),
        adapter_dtype=next(name for name, known in DTYPES.items() if known is dtype),
        adapter_keys=None
        if base.wrapper is None
        else "text"
        if opened.prefix == OWN
        else "wrapper",
    )
    clear_adapter(model, adapter)
    switch = switch_of(model)
    for name, (r, _) in opened.modules.items():
        layer = lora_layer(model, name, switch)
        with torch.random.fork_rng(devices=[]):
            dropout = KeyedDropout(lora.dropout, seed, name)
            layer.add_adapter(adapter, r, opened.scaling(name), dtype, dropout)
        layer.configs[adapter] = lora
        for master, weight in zip(layer.weights(adapter), masters[name], strict=True):
            master.data.copy_(weight)
            master.requires_grad_(False)
    activate(model, adapter)
    return base

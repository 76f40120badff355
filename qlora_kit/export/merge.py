"""Dequantize, add, round once: adapters become part of a plain model, tensor by tensor.

The update is added in fp32 to the base weight as training multiplied by it (dequantized in the
run's compute dtype), and the sum is rounded once to the export's dtype. Merging into the original
weights is offered; it is another model, and `verify` says how far it is from what was trained.
Tensors are made one after another and written shard by shard, so that host memory holds one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.contents import find
from qlora_kit.base.linear import dequantize
from qlora_kit.base.safetensors_file import INDEX_FILE, SINGLE_FILE
from qlora_kit.base.tensors import check_finite, read_tensors
from qlora_kit.base.tokenizer import copy_tokenizer
from qlora_kit.device import DTYPES, dtype_name
from qlora_kit.errors import AdapterError, ConfigError, ExportError
from qlora_kit.files.atomic import check_output, check_room, replace_file, write_file
from qlora_kit.files.publish import publish
from qlora_kit.lora.inject import ADAPTER, lora_layers
from qlora_kit.lora.layer import LoRALinear, delta_weight

SHARD_SIZE = 4 * 1024**3
REPORT = "export.json"
"""What an export says of itself; by it, too, a later one knows what it may replace."""


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of the exported model: its shape, and how to make it."""

    name: str
    shape: torch.Size
    make: Callable[[], Tensor]


def export_model(
    base: Base,
    output_dir: str | os.PathLike[str],
    *,
    adapter: str | None = ADAPTER,
    merge_base: str = "dequantized",
    dtype: str = "auto",
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    inspect: Callable[[Path], None] | None = None,
) -> Path:
    """Write `base` with `adapter` merged as a plain transformers model; returns its directory.

    `adapter` None exports the base alone. `dtype` auto is the compute dtype of the run;
    `shard_size` is in bytes. The directory appears whole or not at all; `inspect` is called with it
    while it still lies aside, and may raise to keep it from appearing. Errors: `ConfigError` and
    `ResourceError` for the place, `AdapterError`, `NumericError`, `ExportError`.
    """
    target = Path(output_dir)
    check_output(target, overwrite, [base.source.directory])
    if adapter is not None and not any(
        adapter in one.lora_A for one in lora_layers(base.model).values()
    ):
        raise AdapterError(f"the model has no adapter {adapter!r}", "load one, or name another")
    export_dtype = base.dtype if dtype == "auto" else DTYPES[dtype]
    tensors = export_tensors(base, adapter, merge_base)
    size = sum(tensor.shape.numel() for tensor in tensors) * export_dtype.itemsize
    check_room(target, size, "the export")
    with publish(target) as directory:
        _write_shards(tensors, directory, export_dtype, shard_size)
        _write_settings(base, directory, export_dtype)
        said = {"merge_base": merge_base, "dtype": dtype_name(export_dtype)}
        write_file(directory / REPORT, json.dumps(said | {"base": base.info.as_dict()}).encode())
        if inspect is not None:
            inspect(directory)
    return target


def export_tensors(
    base: Base, adapter: str | None = ADAPTER, merge_base: str = "dequantized"
) -> list[ExportTensor]:
    """Every tensor of the plain model in its order; each is made when it is asked for.

    `merge_base`: `dequantized` adds to the weights that training multiplied by, `original` to the
    checkpoint's own. Errors: `ConfigError` for the original weights of a checkpoint that holds
    quantized ones only.
    """
    model = base.model
    entries = base.entries if merge_base == "original" else {}
    packed = [name for name, entry in entries.items() if not entry.torch_dtype.is_floating_point]
    if packed:
        raise ConfigError(
            f"--merge_base original: the base holds {packed[0]} in quantized form only",
            "use --merge_base dequantized",
        )

    def frozen(name: str, linear: nn.Linear) -> Tensor:
        if merge_base == "dequantized":
            return dequantize(linear, base.dtype)
        # The buffer that the reader lends is used again, so the tensor is copied out of it.
        key = f"{name}.weight"
        return next(tensor.clone() for _, tensor in read_tensors({key: entries[key]}))

    def merged(name: str, layer: LoRALinear) -> Tensor:
        weight = frozen(name, layer.base_layer)
        if adapter is None or adapter not in layer.lora_A:
            return weight
        return weight.float().add_(delta_weight(layer, adapter).to(weight.device))

    tensors, adapted = [], lora_layers(model)
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        linear = adapted[name].base_layer if name in adapted else module
        made = dict(linear.named_parameters(recurse=False))
        if isinstance(linear, nn.Linear) and module is not model.get_output_embeddings():
            shape = torch.Size((linear.out_features, linear.in_features))
            make = (
                partial(merged, name, adapted[name])
                if name in adapted
                else partial(frozen, name, linear)
            )
            tensors.append(ExportTensor(f"{name}.weight", shape, make))
            made.pop("weight")
        for leaf, parameter in made.items():
            full = f"{name}.{leaf}"
            if parameter is model.get_input_embeddings().weight and "embed" not in name:
                continue  # a tied head: the embedding is written, and config.json says tied
            tensors.append(ExportTensor(full, parameter.shape, parameter.detach))
    return tensors


def _write_shards(
    tensors: list[ExportTensor], directory: Path, dtype: torch.dtype, shard_size: int
) -> None:
    shards: list[list[ExportTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.shape.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        content = {}
        for tensor in shard:
            value = tensor.make().to("cpu", dtype)
            check_finite(value, f"{tensor.name} of the export", "use a wider --dtype")
            content[tensor.name] = value.contiguous()
            where[tensor.name] = file
        _save(content, directory / file)
    if len(shards) > 1:
        total = sum(tensor.shape.numel() * dtype.itemsize for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(directory / INDEX_FILE, json.dumps(index, indent=2).encode())


def _save(content: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    try:
        replace_file(path, lambda aside: save_file(content, aside, {"format": "pt"}))
    except Exception as error:
        if isinstance(error, OSError):
            raise
        # safetensors raises its own class for what the system refuses.
        raise ExportError(f"{path}: {error}", "free some space or choose another place") from error


def _write_settings(base: Base, directory: Path, dtype: torch.dtype) -> None:
    source = base.source.directory
    config = json.loads((source / "config.json").read_text(encoding="utf-8-sig"))
    long_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype_name(dtype)]
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = long_name
    if "torch_dtype" not in config:
        config["dtype"] = long_name
    if base.embedding_rows is not None:
        config["vocab_size"] = base.embedding_rows
    config.pop("quantization_config", None)
    config.pop("auto_map", None)  # it names Python files that are not written
    write_file(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    copy_tokenizer(source, directory)
    if settings := find(source, "generation_config.json"):
        shutil.copyfile(settings, directory / "generation_config.json")

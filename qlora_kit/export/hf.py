"""The writer of plain transformers models: safetensors in shards, config.json, the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.base.safetensors_file import INDEX_FILE, SINGLE_FILE
from qlora_kit.base.tensors import check_finite
from qlora_kit.base.tokenizer import copy_tokenizer
from qlora_kit.config.export import ExportConfig
from qlora_kit.device.target import DTYPES, dtype_name
from qlora_kit.errors import ExportError
from qlora_kit.export.tensors import ExportTensor, dtype_of, export_tensors
from qlora_kit.export.towers import (
    check_towers_stay,
    copy_processors,
    model_config,
    whole_tensors,
)
from qlora_kit.files.atomic import replace_file, write_file


def hf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export; refuses towers that cannot stay. Errors: `ConfigError`."""
    size = base.parameters * DTYPES[dtype_of(base, options)].itemsize
    if options.with_towers:
        check_towers_stay(base)
        size += 0 if base.wrapper is None else base.wrapper.left_bytes
    return size


def write_hf(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the merged model, in files of `shard_size` bytes, with config and tokenizer.

    With towers it is the whole multimodal model that is written. Host memory holds one file.
    Errors: `ConfigError`, `NumericError`, `ExportError`, `ResourceError`.
    """
    dtype = DTYPES[dtype_of(base, options)]
    tensors = export_tensors(base, adapter, options.merged_into)
    if options.with_towers:
        tensors = whole_tensors(base, tensors)
    _write_shards(tensors, directory, dtype, options.shard_size)
    _write_settings(base, directory, dtype, options.with_towers)
    if options.with_towers:
        copy_processors(base.source.directory, directory)


def _write_shards(
    tensors: Sequence[ExportTensor], directory: Path, dtype: torch.dtype, shard_size: int
) -> None:
    shards: list[list[ExportTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.nbytes(dtype)
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
            value = tensor.make().to("cpu", tensor.kept or dtype)
            if tensor.kept is None:
                check_finite(value, f"{tensor.name} of the export", "use a wider --dtype")
            content[tensor.name] = value.contiguous()
            where[tensor.name] = file
        _save(content, directory / file)
    if len(shards) > 1:
        total = sum(tensor.nbytes(dtype) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(directory / INDEX_FILE, json.dumps(index, indent=2).encode())


def _save(content: dict[str, Tensor], path: Path) -> None:
    try:
        replace_file(path, lambda aside: save_file(content, aside, {"format": "pt"}))
    except Exception as error:
        if isinstance(error, OSError):
            raise
        # safetensors raises its own class for what the system refuses.
        raise ExportError(f"{path}: {error}", "free some space or choose another place") from error


def _write_settings(base: Base, directory: Path, dtype: torch.dtype, with_towers: bool) -> None:
    source, files = base.source.directory, base.files
    assert files is not None  # its weights were read
    config = model_config(base, with_towers)
    long_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype_name(dtype)]
    for part in (config, config.get("text_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = long_name
    if "torch_dtype" not in config:
        config["dtype"] = long_name
    config.pop("auto_map", None)  # it names Python files that are not written
    write_file(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    copy_tokenizer(files.tokenizer, directory)
    if files.generation is not None:
        shutil.copyfile(source / "generation_config.json", directory / "generation_config.json")

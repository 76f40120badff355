"""The writer of plain transformers models: the weights as numbers, and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.device.target import DTYPES, dtype_name
from qlora_kit.export.head import head_notes, head_size, is_untied
from qlora_kit.export.shards import numbers, write_shards
from qlora_kit.export.tensors import check_merge_base, dtype_of, export_tensors
from qlora_kit.export.towers import (
    check_towers_stay,
    copy_processors,
    model_config,
    whole_tensors,
)
from qlora_kit.files.atomic import write_file


def hf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export; refuses towers that cannot stay, and weights that are not there.

    Errors: `ConfigError`.
    """
    check_merge_base(base, options.merged_into)
    count = base.parameters + head_size(base, options)
    size = count * DTYPES[dtype_of(base, options)].itemsize
    if options.with_towers:
        check_towers_stay(base)
        size += 0 if base.wrapper is None else base.wrapper.left_bytes
    return size


def hf_notes(base: Base, options: ExportConfig) -> list[str]:
    """What users of the export should know."""
    return head_notes(base, options)


def write_hf(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the model in files of `shard_size` bytes, with its config.

    The adapter is in its weights, or left out. With towers it is the whole multimodal model that
    is written. Host memory holds one tensor.
    Errors: `ConfigError`, `NumericError`, `ExportError`, `ResourceError`.
    """
    dtype = DTYPES[dtype_of(base, options)]
    untied = is_untied(base, options)
    tensors = export_tensors(base, adapter, options.merged_into, untied=untied)
    if options.with_towers:
        tensors = whole_tensors(base, tensors)
    write_shards([numbers(one, dtype) for one in tensors], directory, options.shard_size)
    write_config(base, directory, dtype, with_towers=options.with_towers, untied=untied)
    if options.with_towers:
        copy_processors(base.source.directory, directory)


def write_config(
    base: Base,
    directory: Path,
    dtype: torch.dtype,
    *,
    with_towers: bool = False,
    quantization: Mapping[str, Any] | None = None,
    untied: bool = False,
) -> None:
    """Write config.json of an export of `base` in `dtype`.

    `quantization` is the `quantization_config` of an export that has one. With `untied` the head
    shares nothing with the embedding, whatever the base's own says.
    """
    config = model_config(base, with_towers)
    if untied:
        config["tie_word_embeddings"] = False
    long_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype_name(dtype)]
    for part in (config, config.get("text_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = long_name
    if "torch_dtype" not in config:
        config["dtype"] = long_name
    config.pop("auto_map", None)  # it names Python files that are not written
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_file(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())

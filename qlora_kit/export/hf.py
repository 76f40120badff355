"""The writer of plain transformers models: the weights as numbers, and config.json.

Of a multimodal checkpoint the towers are taken over byte for byte where they are asked for, and the
merged decoder goes back under the names that the files have. Nothing of a tower is looked at.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.contents import PROCESSOR_FILES, find
from qlora_kit.base.meta_model import with_rows
from qlora_kit.base.tensors import as_stored
from qlora_kit.config.export import ExportConfig
from qlora_kit.device.target import DTYPES, dtype_name
from qlora_kit.errors import ConfigError
from qlora_kit.export.head import head_notes, head_size, is_untied
from qlora_kit.export.shards import numbers, write_shards
from qlora_kit.export.tensors import (
    ExportTensor,
    check_merge_base,
    dtype_of,
    export_tensors,
    named_as_in_files,
)
from qlora_kit.files.atomic import write_file

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32")
"""dtypes of tensors that are what they look like; others belong to a quantized form."""

hf_notes = head_notes
"""What users of the export should know is what they should of its head."""


def hf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export; refuses towers that cannot stay, and weights that are not there.

    Errors: `ConfigError`.
    """
    check_merge_base(base, options.merged_into)
    count = base.parameters + head_size(base, options)
    size = count * DTYPES[dtype_of(base, options)].itemsize
    if options.with_towers:
        _check_towers_stay(base)
        size += 0 if base.wrapper is None else base.wrapper.left_bytes
    return size


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
        tensors = _whole_tensors(base, tensors)
    write_shards([numbers(one, dtype) for one in tensors], directory, options.shard_size)
    write_config(base, directory, dtype, with_towers=options.with_towers, untied=untied)
    if options.with_towers:
        _copy_processors(base.source.directory, directory)


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
    config = _model_config(base, with_towers)
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


def _check_towers_stay(base: Base) -> None:
    """Refuse `--with_towers` where there are none, or only in a quantized form.

    Errors: `ConfigError`.
    """
    left = {} if base.wrapper is None else base.wrapper.left or {}
    remedy = "leave --with_towers out: the text model alone is written"
    if not left:
        raise ConfigError(f"with_towers is given, and {base.source.name} has none", remedy)
    for name, entry in left.items():
        if entry.dtype not in PLAIN:
            raise ConfigError(
                f"with_towers: {name} is quantized in the files ({entry.dtype}), and the export is "
                "not",
                remedy,
            )


def _whole_tensors(base: Base, tensors: Sequence[ExportTensor]) -> list[ExportTensor]:
    """The decoder's tensors by the files' names, and every tower's with the bytes that it has."""
    left = {} if base.wrapper is None else base.wrapper.left or {}
    return named_as_in_files(tensors, base) + [
        ExportTensor(name, torch.Size(entry.shape), partial(as_stored, entry), entry.torch_dtype)
        for name, entry in left.items()
    ]


def _model_config(base: Base, with_towers: bool) -> dict[str, Any]:
    """The config.json of an export, its dtype yet to be set: of what is written, unquantized."""
    rows = base.embedding_rows

    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        changed = with_rows(config, rows) if rows is not None else dict(config)
        changed.pop("quantization_config", None)
        return changed

    if base.wrapper is None:
        assert base.files is not None  # its weights were read
        return plain(base.files.config)
    whole = base.wrapper.config
    if not with_towers:
        tied = bool(getattr(base.model.config, "tie_word_embeddings", False))
        own = {"architectures": [type(base.model).__name__], "tie_word_embeddings": tied}
        return plain({**base.wrapper.text, **own})
    if "text_config" not in whole:
        return plain(whole)
    changed = {**whole, "text_config": plain(whole["text_config"])}
    changed.pop("quantization_config", None)
    return changed


def _copy_processors(source: Path, directory: Path) -> None:
    """Copy how images and sounds become tokens, as the files say it."""
    for name in PROCESSOR_FILES:
        if path := find(source, name):
            shutil.copyfile(path, directory / name)

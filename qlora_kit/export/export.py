"""A model with its adapter in it, in a directory that appears whole or not at all.

It is written aside, inspected while nobody sees it, and put in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.device.target import DTYPES, dtype_name
from qlora_kit.errors import AdapterError
from qlora_kit.export.hf import write_model
from qlora_kit.export.tensors import export_tensors
from qlora_kit.export.towers import check_towers_stay, whole_tensors
from qlora_kit.files.atomic import EXPORT_REPORT, check_output, check_room, write_file
from qlora_kit.files.publish import publish
from qlora_kit.lora.inject import ADAPTER, lora_layers

SHARD_SIZE = 4 * 1024**3


def check_export(base: Base, target: Path, dtype: torch.dtype, with_towers: bool) -> None:
    """Refuse what needs no weights: towers that cannot stay, a disk without room for the export.

    Errors: `ConfigError`, `ResourceError`.
    """
    size = base.parameters * dtype.itemsize
    if with_towers:
        check_towers_stay(base)
        size += 0 if base.wrapper is None else base.wrapper.left_bytes
    check_room(target, size, "the export")


def export_model(
    base: Base,
    output_dir: str | os.PathLike[str],
    *,
    adapter: str | None = ADAPTER,
    merge_base: str = "dequantized",
    dtype: str = "auto",
    shard_size: int = SHARD_SIZE,
    with_towers: bool = False,
    overwrite: bool = False,
    inspect: Callable[[Path], None] | None = None,
) -> Path:
    """Write `base` with `adapter` merged as a plain transformers model; returns its directory.

    `adapter` None exports the base alone. Of a multimodal checkpoint the text model is written;
    `with_towers` writes the whole, its towers byte for byte. `dtype` auto is the compute dtype of
    the run; `shard_size` is in bytes. The directory appears whole or not at all; `inspect` is
    called with it while it still lies aside, and may raise to keep it from appearing.
    Errors: `ConfigError` and `ResourceError` for the place, `AdapterError`, `NumericError`,
    `ExportError`.
    """
    target = Path(output_dir)
    check_output(target, overwrite, [base.source.directory])
    if adapter is not None and not any(
        adapter in one.lora_A for one in lora_layers(base.model).values()
    ):
        raise AdapterError(f"the model has no adapter {adapter!r}", "load one, or name another")
    export_dtype = base.dtype if dtype == "auto" else DTYPES[dtype]
    tensors = export_tensors(base, adapter, merge_base)
    check_export(base, target, export_dtype, with_towers)
    if with_towers:
        tensors = whole_tensors(base, tensors)
    with publish(target) as directory:
        write_model(base, tensors, directory, export_dtype, shard_size, with_towers)
        said: dict[str, Any] = {"merge_base": merge_base, "dtype": dtype_name(export_dtype)}
        said |= {"base": base.info.as_dict()}
        write_file(directory / EXPORT_REPORT, json.dumps(said).encode())
        if inspect is not None:
            inspect(directory)
    return target

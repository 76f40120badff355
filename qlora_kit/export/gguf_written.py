"""A GGUF compared with what was to be written, by the package gguf: its keys, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.errors import ExportError
from qlora_kit.export.gguf import gguf_file
from qlora_kit.gguf.file import FileTensor, Value
from qlora_kit.gguf.layout import import_gguf
from qlora_kit.gguf.tensor_types import encode
from qlora_kit.lora.inject import ADAPTER

QUANTIZED = ("general.file_type", "general.quantization_version")
"""The keys that llama.cpp writes where it quantizes."""
REMEDY = "nothing was written; export it again, and look at the disk if it stays"


def check_fields(base: Base, options: ExportConfig, file: Path) -> None:
    """Compare each key of a file with what was to be written, the type of its tensors aside.

    Errors: `ExportError`.
    """
    made = gguf_file(base, ADAPTER, options)
    wanted = {key: _held(value) for key, value in made.fields}
    wanted["general.architecture"] = made.architecture
    fields = import_gguf().GGUFReader(file).fields.items()
    found = {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}
    if options.quantize is not None:
        for key in QUANTIZED:
            wanted.pop(key, None)
            found.pop(key, None)
    keys = sorted(wanted.keys() | found.keys())
    if wrong := [key for key in keys if key not in found or wanted.get(key) != found[key]]:
        raise ExportError(_other(file, wrong), REMEDY)


def check_tensors(base: Base, options: ExportConfig, file: Path) -> int:
    """Compare each tensor of a file with what was to be written; their number.

    Errors: `ExportError`.
    """
    wanted = {one.name: one for one in gguf_file(base, ADAPTER, options).tensors}
    found = {one.name: one for one in import_gguf().GGUFReader(file).tensors}
    wrong = sorted(wanted.keys() ^ found.keys())
    if not wrong:
        wrong = [name for name in wanted if not _is_written(found[name].data, wanted[name])]
    if wrong:
        raise ExportError(_other(file, wrong), REMEDY)
    return len(found)


def _other(file: Path, wrong: Sequence[str]) -> str:
    return f"{file.name}: {wrong[0]} is not what was written, and {len(wrong) - 1} others"


def _held(value: Value) -> Any:
    """A value as a file has it: real numbers have 32 bits."""
    if isinstance(value, float):
        return float(np.float32(value))
    return value if isinstance(value, str | int) else [_held(one) for one in value]


def _is_written(held: np.ndarray, tensor: FileTensor) -> bool:
    """Whether the bytes of a tensor are those that were to be written, some rows at a time."""
    data, start = held.reshape(-1).view(np.uint8), 0
    for piece in encode(tensor.make(), tensor.kind, tensor.name):
        part = piece.reshape(-1).view(np.uint8)
        if not np.array_equal(data[start : start + len(part)], part):
            return False
        start += len(part)
    return start == len(data)

"""A GGUF file, written with one tensor in memory: what it says first, then the tensors in order.

The same fields and tensors are the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qlora_kit.files.atomic import replace_file
from qlora_kit.gguf.layout import import_gguf
from qlora_kit.gguf.tensor_types import encode, nbytes

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Fields = Sequence[tuple[str, Value]]
"""Keys and values: texts, truth values, unsigned and real numbers of 32 bits, and lists of one
kind; whole numbers in lists have a sign."""
ALIGNED = 32
"""Tensors begin at multiples of it."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file: its shape as torch has it, its type, and how to make it."""

    name: str
    shape: Sequence[int]
    kind: str
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file, without what is between tensors."""
        return nbytes(self.shape, self.kind)


def head_bytes(fields: Fields, tensors: Sequence[FileTensor]) -> int:
    """Bytes of what a file says before its tensors, and at most between them."""
    said = sum(len(key) + 12 + _bytes(value) for key, value in fields)
    return 64 + said + sum(len(one.name) + 24 + 8 * len(one.shape) + ALIGNED for one in tensors)


def write_gguf_file(
    path: Path, architecture: str, fields: Fields, tensors: Sequence[FileTensor]
) -> None:
    """Write a file whole or not at all.

    Errors: `NumericError` for a tensor that its type cannot hold, and what the system refuses.
    """

    def write(aside: Path) -> None:
        try:
            _write_head(aside, architecture, fields, tensors)
            _append(aside, tensors)
        except OSError as error:
            error.filename = error.filename or str(path)  # a write knows a number only
            raise

    replace_file(path, write)


def _write_head(
    path: Path, architecture: str, fields: Fields, tensors: Sequence[FileTensor]
) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields:
        writer.add_key_value(key, value, *_types(gguf.GGUFValueType, value))
    for one in tensors:
        kind = gguf.GGMLQuantizationType[one.kind]
        # The dtype of the bytes would say that the shape counts bytes.
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _append(path: Path, tensors: Sequence[FileTensor]) -> None:
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % ALIGNED))
        for one in tensors:
            start = file.tell()
            for part in encode(one.make(), one.kind, one.name):
                file.write(part.data)
            assert file.tell() - start == one.nbytes, one.name
            file.write(bytes(-one.nbytes % ALIGNED))


def _types(types: Any, value: Value) -> tuple[Any, ...]:
    """The type of a value, and that of its items where it is a list."""
    if isinstance(value, str):
        return (types.STRING,)
    if isinstance(value, bool):
        return (types.BOOL,)
    if isinstance(value, int):
        return (types.UINT32,)
    if isinstance(value, float):
        return (types.FLOAT32,)
    item = value[0]
    kinds = {str: types.STRING, int: types.INT32, float: types.FLOAT32, bool: types.BOOL}
    return types.ARRAY, kinds[type(item)]


def _bytes(value: Value) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if isinstance(value, Sequence):
        return 12 + sum(map(_bytes, value))
    return 4

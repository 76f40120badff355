"""Tensors of checked files: read one at a time into one buffer, and refused where not finite.

Plain reads are used because mapped files count as the process's own memory until they are unmapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.validate import TensorEntry
from qlora_kit.errors import ModelError, NumericError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The compute dtypes by their short names."""


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`; torch's own name for any other."""
    short = {value: key for key, value in DTYPES.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def read_tensors(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the CPU, in the files' order; each is valid until the next one is asked for.

    One buffer of the largest tensor's size is reused. Errors: `NumericError` with the tensor's
    name for a value that is not finite.
    """
    largest = max((entry.end - entry.start for entry in entries.values()), default=0)
    buffer = bytearray(largest)
    for entry in sorted(entries.values(), key=lambda entry: (str(entry.path), entry.start)):
        view = memoryview(buffer)[: entry.end - entry.start]
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            if _read_fully(file, view) != len(view):
                raise ModelError(f"{entry.path}: ended early", "fetch the file again")
        tensor = (
            torch.frombuffer(view, dtype=entry.torch_dtype).view(entry.shape)
            if len(view)
            else torch.empty(entry.shape, dtype=entry.torch_dtype)
        )
        check_finite(tensor, f"{entry.path}: {entry.name}")
        yield entry.name, tensor


def _read_fully(file: Any, view: memoryview) -> int:
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse a tensor with a NaN or an infinity. Errors: `NumericError` with their number."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # A sum is finite only if every value is; it makes no copy. Where it overflows, values decide.
    if not torch.isfinite(tensor.sum()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{name} holds {bad} values that are not finite", "fetch the file again"
            )

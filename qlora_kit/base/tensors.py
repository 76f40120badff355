"""Tensors of checked files: read one at a time into one buffer, and refused where not finite.

Plain reads are used because mapped files count as the process's own memory until they are unmapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.device.target import has_values
from qlora_kit.errors import ModelError, NumericError
from qlora_kit.files.opened import OpenFiles


def untagged(component: str, tensors: Iterable[Tensor]) -> None:
    """The `Tag` where nobody counts."""


Tag = Callable[[str, Iterable[Tensor]], None]
"""Is called with a component of a run's memory and tensors that belong to it."""
Read = Callable[[TensorEntry, Tensor], None]
"""Fills a flat uint8 tensor with the bytes of an entry."""


class Reader(OpenFiles):
    """The `Read` of files, each of which is opened once."""

    def __call__(self, entry: TensorEntry, into: Tensor) -> None:
        """Read the bytes of an entry. Errors: `ModelError` where the file is too short."""
        view, done, file = memoryview(into.numpy().data), 0, self.open(entry.path)
        file.seek(entry.start)
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
        if done != len(view):
            raise ModelError(f"{entry.path}: ended early", "fetch the file again")


def read_tensors(
    entries: Mapping[str, TensorEntry], read: Read | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the CPU, in the files' order; each is valid until the next one is asked for.

    It comes with its key in `entries`. One buffer of the largest tensor's size is reused. Without
    `read` the files are opened here.
    Errors: `NumericError` with the tensor's name for a value that is not finite.
    """
    if read is None:
        with Reader() as own:
            yield from read_tensors(entries, own)
        return
    largest = max((entry.end - entry.start for entry in entries.values()), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    for name in sorted(entries, key=lambda name: (str(entries[name].path), entries[name].start)):
        entry = entries[name]
        part = buffer[: entry.end - entry.start]
        read(entry, part)
        tensor = part.view(entry.torch_dtype).view(entry.shape)
        check_finite(tensor, f"{entry.path}: {entry.name}")
        yield name, tensor


def check_finite(tensor: Tensor, name: str, remedy: str = "fetch the file again") -> None:
    """Refuse a tensor with a NaN or an infinity. Errors: `NumericError` with their number."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.itemsize == 1:
        return  # torch 2.13 adds no 8-bit floats; what they mean is checked (`fp8_checkpoint.py`)
    # A sum is finite only if every value is; it makes no copy. Where it overflows, values decide.
    total = tensor.sum()
    if has_values(total) and not math.isfinite(total.item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(f"{name} holds {bad} values that are not finite", remedy)

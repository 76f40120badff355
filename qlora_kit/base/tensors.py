"""Tensors of checked files: read one at a time into one buffer, and refused where not finite.

Plain reads are used because mapped files count as the process's own memory until they are unmapped.
The buffer lies where the tensors are wanted. On a device of its own memory the bytes come piece by
piece through the host's (`device/host_buffers.py`), and nothing waits: the next ones are read while
those before are copied, checked and quantized. Each look at numbers makes the host wait for all
that the device was given, so loading notes their extremes (`NumberChecks`) and reads them once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.device.host_buffers import HostBuffers
from qlora_kit.device.target import device_type, dtype_name, has_values, representative
from qlora_kit.errors import ModelError, NumericError
from qlora_kit.files.opened import OpenFiles

FINITE = sys.float_info.max
"""The limit of what need only be finite."""


class NumberChecks:
    """Notes tensors and their limits; `read` raises for the first that is beyond its own."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []
        self._limits: list[tuple[float, Callable[[float], NumericError]]] = []

    def add(self, tensor: Tensor, limit: float, error: Callable[[float], NumericError]) -> None:
        """A tensor of which no value may be above `limit` by its size, or NaN.

        `error` is made of the largest size that it has. The tensor may change after the call.
        """
        # A NaN is both of the extremes.
        self._extremes.append(torch.stack(torch.aminmax(tensor)).double())
        self._limits.append((limit, error))

    def read(self) -> None:
        """Look at all of them, in one transfer. Errors: `NumericError`."""
        if not self._extremes or not has_values(self._extremes[0]):
            return
        found = torch.stack(self._extremes).tolist()
        for (low, high), (limit, error) in zip(found, self._limits, strict=True):
            if not (-limit <= low and high <= limit):
                raise error(max(-low, high))


CPU = torch.device("cpu")
PIECE = 2**25
"""Bytes of a tensor that go to a device, or into memory of its own, at once: 32 MiB."""


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


def as_stored(entry: TensorEntry) -> Tensor:
    """A tensor with the bytes of its entry, of any dtype, on the CPU and not looked at."""
    held = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    with Reader() as read:
        read(entry, held)
    return held.view(entry.torch_dtype).view(entry.shape)


def read_tensors(
    entries: Mapping[str, TensorEntry],
    read: Read | None = None,
    *,
    device: torch.device = CPU,
    kept: Mapping[str, torch.dtype] | None = None,
    checks: NumberChecks | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on `device`, in the files' order, with its key in `entries`.

    Each is valid until the next one is asked for: one buffer of the largest tensor's size is
    reused. Those that are `kept` come in the dtype that is given there, in memory of their own.
    Without `read` the files are opened here.
    Errors: `NumericError` with the tensor's name for a value that is not finite; that of `checks`
    comes where they are read.
    """
    if read is None:
        with Reader() as own:
            yield from read_tensors(entries, own, device=device, kept=kept, checks=checks)
        return
    kept = kept or {}
    sizes = {name: entry.end - entry.start for name, entry in entries.items()}
    lent = (min(size, PIECE) if name in kept else size for name, size in sizes.items())
    buffer = torch.empty(max(lent, default=0), dtype=torch.uint8, device=device)
    if device_type(buffer) != "cpu":
        read = _through_the_host(read, max(1, min(PIECE, buffer.numel())), device)
    for name in sorted(entries, key=lambda name: (str(entries[name].path), entries[name].start)):
        entry = entries[name]
        if name in kept:
            yield name, _own(name, entry, kept[name], buffer, read, checks)
            continue
        part = buffer[: sizes[name]]
        read(entry, part)
        tensor = part.view(entry.torch_dtype).view(entry.shape)
        check_finite(tensor, f"{entry.path}: {entry.name}", checks=checks)
        yield name, tensor


def _own(
    name: str,
    entry: TensorEntry,
    dtype: torch.dtype,
    buffer: Tensor,
    read: Read,
    checks: NumberChecks | None,
) -> Tensor:
    """A tensor in memory of its own, which its pieces reach through the buffer."""
    made = torch.empty(entry.shape, dtype=dtype, device=buffer.device)
    stored, flat = entry.torch_dtype, made.view(-1)
    step = PIECE // stored.itemsize
    for start in representative(range(0, flat.numel(), step), flat):
        part = flat[start : start + step]
        raw = buffer[: part.numel() * stored.itemsize]
        begin = entry.start + start * stored.itemsize
        read(replace(entry, start=begin, end=begin + raw.numel()), raw)
        numbers = raw.view(stored)
        check_finite(numbers, f"{entry.path}: {entry.name}", checks=checks)
        part.copy_(numbers)
        if dtype is not stored:
            check_finite(part, f"{name} in {dtype_name(dtype)}", checks=checks)
    return made


def _through_the_host(read: Read, nbytes: int, device: torch.device) -> Read:
    """`read` into memory of a device, through two pieces of the host's memory of `nbytes` each."""
    buffers = HostBuffers(nbytes, device)

    def upload(entry: TensorEntry, into: Tensor) -> None:
        for start in representative(range(0, into.numel(), nbytes), into):
            part = into[start : start + nbytes]
            piece, begin = buffers.take()[: part.numel()], entry.start + start
            read(replace(entry, start=begin, end=begin + part.numel()), piece)
            part.copy_(piece, non_blocking=True)
            buffers.sent()

    return upload


def checks_later(like: Tensor) -> NumberChecks | None:
    """What notes the numbers of tensors on the device of `like`, to look at them together.

    None on the host, where a look waits for nothing.
    """
    return None if device_type(like) == "cpu" else NumberChecks()


def check_finite(
    tensor: Tensor,
    name: str,
    remedy: str = "fetch the file again",
    checks: NumberChecks | None = None,
) -> None:
    """Refuse a tensor with a NaN or an infinity, at once or where `checks` are read.

    Errors: `NumericError`, at once with their number.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.itemsize == 1:
        return  # torch 2.13 adds no 8-bit floats; what they mean is checked (`fp8_checkpoint.py`)
    if checks is not None:
        said = f"{name} holds values that are not finite"
        checks.add(tensor, FINITE, lambda largest: NumericError(said, remedy))
        return
    # A sum is finite only if every value is; it makes no copy. Where it overflows, values decide.
    total = tensor.sum()
    if has_values(total) and not math.isfinite(total.item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(f"{name} holds {bad} values that are not finite", remedy)

"""A safetensors file that is written one tensor at a time.

The library's own writer wants all tensors of a file in memory. Here a tensor goes to the file as it
comes and may be forgotten; the header, which says where each lies, is put in front of them last,
into room that was kept for it. It is filled up with blanks, as the format allows.

Readers take a tensor as numbers where it lies, so each must begin at a multiple of their size: one
whose bytes are no multiple of 8 waits for the end, where the larger numbers come first. What waits
is kept as Python's bytes: small ones lie in memory of their own, while tensors of a byte between
the large ones that come and go would keep the allocator from using their places again.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.base.safetensors_file import DTYPES

ALIGNED = 8
ENTRY_BYTES = 160
"""More than an entry of the header takes beside its name: dtype, shape, first and last byte."""
Entry = dict[str, str | list[int]]
NAMES = {getattr(torch, name, None): short for short, (name, _) in DTYPES.items()}


class TensorFile:
    """A new file at `path` that tensors of the CPU are added to, one at a time.

    `room` is what its header may take (`header_room`), `mode` what the umask is taken from.
    `finish` puts the header in front; without it the file is none. To be used with `with`.
    Errors: `OSError` with the path.
    """

    def __init__(self, path: Path, room: int, mode: int = 0o666) -> None:
        self.path, self.nbytes = path, 0
        self._room = room + -room % ALIGNED
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._waiting: list[tuple[int, str, Entry, bytes]] = []
        with self._named():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            self._file = open(handle, "wb")  # noqa: SIM115
            self._file.seek(8 + self._room)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a disk that is full, which was raised before
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or let it wait."""
        entry: Entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if tensor.nbytes % ALIGNED:
            held = bytes(tensor_bytes(tensor))
            self._waiting.append((tensor.element_size(), name, entry, held))
        else:
            self._write(name, entry, tensor_bytes(tensor))

    def finish(self) -> int:
        """Write what waits, and the header; returns the bytes of all tensors."""
        for _, name, entry, held in sorted(self._waiting, key=lambda one: -one[0]):
            self._write(name, entry, held)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room, "more names than were said"
        with self._named():
            assert self._file.tell() == 8 + self._room + self.nbytes
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            self._file.close()
        return self.nbytes

    def _write(self, name: str, entry: Entry, held: bytes | memoryview) -> None:
        self._entries[name] = entry | {"data_offsets": [self.nbytes, self.nbytes + len(held)]}
        with self._named():
            self.nbytes += self._file.write(held)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Inside, what the system refuses has the path: the call knows a number only."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


def header_room(names: Iterable[str]) -> int:
    """What a header of tensors with these names takes at most."""
    return 64 + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], names: Sequence[str]) -> int:
    """Write tensors of the CPU to a new file, in their order; returns the bytes of them all.

    `names` are those that will come. Memory holds the tensor that comes, and those that wait.
    """
    with TensorFile(path, header_room(names)) as file:
        for name, tensor in tensors:
            file.add(name, tensor)
            del tensor  # before the next one is made
        return file.finish()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the CPU in its order, where they lie if they lie in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

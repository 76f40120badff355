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

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.base.safetensors_file import DTYPES

ALIGNED = 8
ENTRY_BYTES = 160
"""More than an entry of the header takes beside its name: dtype, shape, first and last byte."""
Entry = dict[str, str | list[int]]
NAMES = {getattr(torch, name, None): short for short, (name, _) in DTYPES.items()}


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], names: Sequence[str]) -> int:
    """Write tensors of the CPU to a new file, in their order; returns the bytes of them all.

    `names` are those that will come. Memory holds the tensor that comes, and those that wait.
    """
    room = 64 + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
    room += -room % ALIGNED
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    waiting: list[tuple[int, str, Entry, bytes]] = []
    try:
        with open(path, "wb") as file:
            end, start = 0, file.seek(8 + room)
            for name, tensor in tensors:
                entry: Entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
                if tensor.nbytes % ALIGNED:
                    waiting.append((tensor.element_size(), name, entry, bytes(_bytes(tensor))))
                else:
                    entries[name] = entry | {"data_offsets": [end, end + tensor.nbytes]}
                    end += file.write(_bytes(tensor))
                del tensor  # before the next one is made
            for _, name, entry, held in sorted(waiting, key=lambda one: -one[0]):
                entries[name] = entry | {"data_offsets": [end, end + len(held)]}
                end += file.write(held)
            assert file.tell() == start + end
            header = json.dumps(entries, separators=(",", ":")).encode()
            assert len(header) <= room, "more names than were said"
            file.seek(0)
            file.write(struct.pack("<Q", room) + header.ljust(room))
    except OSError as error:
        error.filename = str(path)  # the call knows a number only
        raise
    return end


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

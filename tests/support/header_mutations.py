"""Seeded damage to safetensors files: the header's bytes, its JSON, and whole tensors.

Where a tensor is changed, offsets and sizes follow, so that the file is otherwise in order and the
damage comes further than the header's check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from json_mutations import CHANGES, RAW, TEXTS, VALUES, Change, edited

Kind = Callable[[Path, Random], object]
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "f32",
    "",
)


def split(path: Path) -> tuple[str, bytes]:
    """The header's text and the data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length].decode(), content[8 + length :]


def join(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    count = len(header) if length is None else length
    path.write_bytes(count.to_bytes(8, "little") + header + data)


def length_changed(path: Path, draw: Random) -> None:
    header, data = split(path)
    n = len(header)
    near = [0, 1, n - 1, n + 1, n + 8, n + len(data), n + len(data) + 1, 10**8, 2**63, 2**64 - 1]
    join(path, header.encode(), data, draw.choice(near))


def header_cut(path: Path, draw: Random) -> None:
    header, data = split(path)
    join(path, header.encode()[: draw.randrange(len(header))], data)


def header_bit_flipped(path: Path, draw: Random) -> None:
    text, data = split(path)
    header = bytearray(text.encode())
    header[draw.randrange(len(header))] ^= 1 << draw.randrange(8)
    join(path, bytes(header), data)


def header_root_replaced(path: Path, draw: Random) -> None:
    join(path, draw.choice(VALUES).encode(), draw.choice([b"", split(path)[1]]))


def data_bit_flipped(path: Path, draw: Random) -> None:
    header, content = split(path)
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    join(path, header.encode(), bytes(data))


def header_kind(change: Change) -> Kind:
    """The kind of a function that changes a document: the header's JSON."""

    def kind(path: Path, draw: Random) -> None:
        header, data = split(path)
        join(path, edited(header, lambda document: change(document, draw)).encode(), data)

    kind.__name__ = f"header_{change.__name__}"
    return kind


def described(header: dict[str, Any], draw: Random) -> tuple[str, dict[str, Any]]:
    """One of the header's tensors."""
    name = draw.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


def dtype_swapped(header: dict[str, Any], draw: Random) -> None:
    described(header, draw)[1]["dtype"] = draw.choice(DTYPES)


def shape_changed(header: dict[str, Any], draw: Random) -> None:
    one = described(header, draw)[1]
    shape, count = one["shape"], math.prod(one["shape"])
    others = [shape[::-1], [count], [1, *shape], [*shape, 1], [2, count // 2], [], [0, *shape]]
    huge = [[2**62, 4], [2**31] * 3, [-1, -count], [1] * 9, [count + 1], [n + 1 for n in shape]]
    one["shape"] = draw.choice([*others, *huge])


def offsets_changed(header: dict[str, Any], draw: Random) -> None:
    one, other = described(header, draw)[1], described(header, draw)[1]
    begin, end = one["data_offsets"]
    moved = [[begin + 4, end + 4], [begin - 4, end - 4], [end, begin], [-begin - 1, end]]
    moved += [[begin, end + 2**40], [begin, 2**64], [begin], [float(begin), end], [begin, begin]]
    one["data_offsets"] = draw.choice([*moved, other["data_offsets"]])


def offsets_exchanged(header: dict[str, Any], draw: Random) -> None:
    one, other = described(header, draw)[1], described(header, draw)[1]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def metadata_changed(header: dict[str, Any], draw: Random) -> str:
    header["__metadata__"] = draw.choice([RAW, {"qlora_kit": RAW}, {"qlora_kit": "[" * 9999}])
    return draw.choice(VALUES)


def said_kind(change: Change) -> Kind:
    """The kind of a function that changes a document: what an adapter says of its base."""

    def kind(path: Path, draw: Random) -> None:
        text, data = split(path)
        header = json.loads(text)
        said = header["__metadata__"]
        said["qlora_kit"] = edited(said["qlora_kit"], lambda document: change(document, draw))
        join(path, json.dumps(header).encode(), data)

    kind.__name__ = f"said_{change.__name__}"
    return kind


HEADER_CHANGES = (dtype_swapped, shape_changed, offsets_changed, offsets_exchanged)
HEADER_CHANGES = (*HEADER_CHANGES, metadata_changed, *CHANGES)

Tensors = dict[str, tuple[str, list[int], bytes]]


def tensor_kind(change: Callable[[Tensors, str, Random], object]) -> Kind:
    """The kind of a function that changes one tensor, given its name; offsets follow."""

    def kind(path: Path, draw: Random) -> None:
        header, data = split(path)
        document = json.loads(header)
        metadata = document.pop("__metadata__", {"format": "pt"})
        tensors = {
            name: (one["dtype"], one["shape"], data[slice(*one["data_offsets"])])
            for name, one in document.items()
        }
        change(tensors, draw.choice(list(tensors)), draw)
        rebuilt: dict[str, Any] = {"__metadata__": metadata}
        pieces, at = [], 0
        for name, (dtype, shape, piece) in tensors.items():
            offsets = [at, at + len(piece)]
            rebuilt[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            pieces.append(piece)
            at += len(piece)
        join(path, json.dumps(rebuilt).encode(), b"".join(pieces))

    kind.__name__ = change.__name__
    return kind


def tensor_dropped(tensors: Tensors, name: str, draw: Random) -> None:
    del tensors[name]


def all_tensors_dropped(tensors: Tensors, name: str, draw: Random) -> None:
    tensors.clear()


def tensor_renamed(tensors: Tensors, name: str, draw: Random) -> None:
    layer = name.replace(".0.", f".{draw.choice([1, 7, 10**9, 10**12])}.")
    tensors[draw.choice([name + "x", name[1:], name.upper(), layer, *TEXTS])] = tensors.pop(name)


def tensor_added(tensors: Tensors, name: str, draw: Random) -> None:
    ends = ("x", ".absmax", ".quant_map", ".quant_state.bitsandbytes__fp4", "_format", ".bias")
    tensors[name + draw.choice(ends)] = tensors[draw.choice(list(tensors))]


def tensor_shortened(tensors: Tensors, name: str, draw: Random) -> None:
    dtype, shape, piece = tensors[name]
    first = draw.choice([0, 1, max(0, (shape or [1])[0] - 1)])
    size = len(piece) // max(1, (shape or [1])[0])
    tensors[name] = (dtype, [first, *shape[1:]], piece[: first * size])


def tensor_cast(tensors: Tensors, name: str, draw: Random) -> None:
    shape = tensors[name][1]
    dtype, width = draw.choice([("U8", 1), ("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8)])
    tensors[name] = (dtype, shape, bytes(width * math.prod(shape)))


def tensor_filled(tensors: Tensors, name: str, draw: Random) -> None:
    dtype, shape, piece = tensors[name]
    pattern = draw.choice([b"\0", b"\xff", b"\x7f", draw.randbytes(8)])
    tensors[name] = (dtype, shape, (pattern * len(piece))[: len(piece)])


def not_finite(tensors: Tensors, name: str, draw: Random) -> None:
    floats = [one for one in tensors if tensors[one][0] in ("F32", "BF16", "F16")]
    dtype, shape, piece = tensors[name := draw.choice(floats)]
    top = {"F32": b"\0\0", "BF16": b"", "F16": b""}[dtype]
    bad = {"F32": b"\x80\x7f", "BF16": b"\x80\x7f", "F16": b"\0\x7c"}[dtype]
    at = draw.randrange(len(piece) // len(top + bad)) * len(top + bad)
    tensors[name] = (dtype, shape, piece[:at] + top + bad + piece[at + len(top + bad) :])


def state_kind(change: Change) -> Kind:
    """The kind of a function that changes a document: the state of a 4-bit tensor."""

    def changed(tensors: Tensors, name: str, draw: Random) -> None:
        name = draw.choice([one for one in tensors if ".quant_state." in one])
        dtype, _, piece = tensors[name]
        state = edited(piece.decode(), lambda document: change(document, draw)).encode()
        tensors[name] = (dtype, [len(state)], state)

    changed.__name__ = f"state_{change.__name__}"
    return tensor_kind(changed)


TENSOR_CHANGES = (tensor_dropped, all_tensors_dropped, tensor_renamed, tensor_added)
TENSOR_CHANGES = (*TENSOR_CHANGES, tensor_shortened, tensor_cast, tensor_filled, not_finite)
SAFETENSORS = (length_changed, header_cut, header_bit_flipped, header_root_replaced)
SAFETENSORS = (*SAFETENSORS, data_bit_flipped, *map(header_kind, HEADER_CHANGES))
SAFETENSORS = (*SAFETENSORS, *map(tensor_kind, TENSOR_CHANGES))


def header_kinds(path: Path) -> tuple[Kind, ...]:
    """The kinds of a safetensors file, with those of the JSON that stands within it."""
    header, kinds = split(path)[0], SAFETENSORS
    if ".quant_state." in header:
        kinds = (*kinds, *map(state_kind, CHANGES))
    if '"qlora_kit"' in header:
        kinds = (*kinds, *map(said_kind, CHANGES))
    return kinds

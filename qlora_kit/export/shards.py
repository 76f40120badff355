"""Tensors to safetensors files of a limited size, with an index where there are several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.base.safetensors_file import INDEX_FILE, SINGLE_FILE
from qlora_kit.base.tensor_file import write_tensors
from qlora_kit.base.tensors import check_finite
from qlora_kit.export.tensors import ExportTensor
from qlora_kit.files.atomic import replace_file, write_file


@dataclass(frozen=True)
class Piece:
    """Tensors that go into one file: their names, what they take at most, and how to make them."""

    names: Sequence[str]
    nbytes: int
    make: Callable[[], Mapping[str, Tensor]]


def numbers(tensor: ExportTensor, dtype: torch.dtype) -> Piece:
    """A tensor in `dtype`, or the one that it keeps; one that is not finite there is refused."""
    return Piece([tensor.name], tensor.nbytes(dtype), partial(_rounded, tensor, dtype))


def write_shards(pieces: Sequence[Piece], directory: Path, shard_size: int) -> None:
    """Write them in their order, in files of at most `shard_size` bytes but for larger pieces.

    Memory holds one piece. Errors: `NumericError`, `ResourceError`.
    """
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    where: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        total += _write(shard, directory / file, where)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(directory / INDEX_FILE, json.dumps(index, indent=2).encode())


def _rounded(tensor: ExportTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    value = tensor.make().to("cpu", tensor.kept or dtype)
    if tensor.kept is None:
        check_finite(value, f"{tensor.name} of the export", "use a wider --dtype")
    return {tensor.name: value}


def _write(shard: Sequence[Piece], path: Path, where: dict[str, str]) -> int:
    """Write the pieces of one file, and say of each tensor `where` it is; the bytes of them."""
    total = 0

    def made() -> Iterator[tuple[str, Tensor]]:
        for piece in shard:
            tensors = dict(piece.make())
            where.update(dict.fromkeys(tensors, path.name))
            for name in list(tensors):
                yield name, tensors.pop(name)  # who takes it is the only one who holds it

    def write(aside: Path) -> None:
        nonlocal total
        total = write_tensors(aside, made(), [name for piece in shard for name in piece.names])

    replace_file(path, write)
    return total

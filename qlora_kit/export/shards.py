"""Tensors to safetensors files of a limited size, with an index where there are several."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_kit.base.safetensors_file import INDEX_FILE, SINGLE_FILE
from qlora_kit.base.tensors import check_finite
from qlora_kit.errors import ExportError
from qlora_kit.export.tensors import ExportTensor
from qlora_kit.files.atomic import replace_file, write_file


@dataclass(frozen=True)
class Piece:
    """Tensors that go into one file: what they take at most, and how to make them, by name."""

    nbytes: int
    make: Callable[[], Mapping[str, Tensor]]


def numbers(tensor: ExportTensor, dtype: torch.dtype) -> Piece:
    """A tensor in `dtype`, or the one that it keeps; one that is not finite there is refused."""
    return Piece(tensor.nbytes(dtype), partial(_rounded, tensor, dtype))


def write_shards(pieces: Sequence[Piece], directory: Path, shard_size: int) -> None:
    """Write them in their order, in files of at most `shard_size` bytes but for larger pieces.

    Memory holds one file. Errors: `NumericError`, `ExportError`, `ResourceError`.
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
        content: dict[str, Tensor] = {}
        for piece in shard:
            content |= {name: one.contiguous() for name, one in piece.make().items()}
        where |= dict.fromkeys(content, file)
        total += sum(tensor.nbytes for tensor in content.values())
        _save(content, directory / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(directory / INDEX_FILE, json.dumps(index, indent=2).encode())


def _rounded(tensor: ExportTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    value = tensor.make().to("cpu", tensor.kept or dtype)
    if tensor.kept is None:
        check_finite(value, f"{tensor.name} of the export", "use a wider --dtype")
    return {tensor.name: value}


def _save(content: dict[str, Tensor], path: Path) -> None:
    try:
        replace_file(path, lambda aside: save_file(content, aside, {"format": "pt"}))
    except Exception as error:
        if isinstance(error, OSError):
            raise
        # safetensors raises its own class for what the system refuses.
        raise ExportError(f"{path}: {error}", "free some space or choose another place") from error

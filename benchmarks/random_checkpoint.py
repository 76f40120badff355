"""A random bf16 checkpoint of a real model's shape, from its config.json alone.

    python benchmarks/random_checkpoint.py CONFIG.json DIRECTORY [--shards 3]

One tile of noise is drawn and repeated, and one tensor is in memory at a time: so an 8 B model
takes as long as its bytes take to be written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.checks import read_config
from qlora_kit.base.meta_model import build_on_meta, expected_shapes
from qlora_kit.base.safetensors_file import INDEX_FILE, SINGLE_FILE, TensorEntry
from qlora_kit.base.tensor_file import write_tensors

STD = 0.02
TILE = 1_048_583
"""Numbers of a tile: a prime, so that the rows of no matrix are equal."""


class Noise:
    """Fills tensors with N(0, 0.02) from one tile, drawn once; vectors, which are norms, with ones.

    It is also what loading reads a file with (`base/tensors.py`), where there is no file.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tile = torch.empty(TILE).normal_(0, STD, generator=generator)
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def fill(self, tensor: Tensor) -> Tensor:
        """The tensor, filled in place."""
        if tensor.dim() < 2:
            return tensor.fill_(1)
        self._repeat(tensor.view(-1), 0)
        return tensor

    def __call__(self, entry: TensorEntry, into: Tensor) -> None:
        """Fill the bytes of an entry, or a piece of it, a flat uint8 tensor, by their place."""
        numbers = into.view(entry.torch_dtype)
        if len(entry.shape) < 2:
            numbers.fill_(1)
        else:
            self._repeat(numbers, entry.start // numbers.itemsize)

    def _repeat(self, flat: Tensor, first: int) -> None:
        """Fill (n,) with what stands from the number `first` on, in a tile without an end."""
        tile, done = self._tile_like(flat), 0
        while done < flat.numel():
            part = tile[(first + done) % TILE :][: flat.numel() - done]
            flat[done : done + part.numel()].copy_(part)
            done += part.numel()

    def _tile_like(self, tensor: Tensor) -> Tensor:
        key = tensor.dtype, tensor.device
        if key not in self._cast:
            self._cast[key] = self._tile.to(tensor.device, tensor.dtype)
        return self._cast[key]


def make_checkpoint(config: Path, directory: Path, shards: int = 1, seed: int = 0) -> None:
    """Write weights drawn from N(0, 0.02), norms of ones, as `shards` files."""
    directory.mkdir(parents=True)
    shutil.copy(config, directory / "config.json")
    model = build_on_meta(read_config(directory), torch.bfloat16, directory / "config.json")
    shapes = expected_shapes(model)
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    names, where, noise = list(shapes), {}, Noise(seed)
    for number in range(shards):
        file = SINGLE_FILE if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        tensors = (
            (name, noise.fill(torch.empty(shapes[name], dtype=torch.bfloat16))) for name in part
        )
        where |= dict.fromkeys(part, file)
        write_tensors(directory / file, tensors, part)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / INDEX_FILE).write_text(json.dumps(index))


def make_base_files(shape: dict[str, Any] | Path, directory: Path, tokenizer: Path) -> Path:
    """A checkpoint of a config, given or in a file, beside it the tokenizer of another base."""
    config = directory.with_suffix(".json")
    if isinstance(shape, Path):
        config = shape
    else:
        config.write_text(json.dumps(shape))
    make_checkpoint(config, directory)
    copy_tokenizer(tokenizer, directory)
    return directory


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Give a checkpoint a small tokenizer, whose ids all fit."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    arguments = parser.parse_args()
    make_checkpoint(arguments.config, arguments.directory, arguments.shards)


if __name__ == "__main__":
    main()

"""A random bf16 checkpoint of a real model's shape, from its config.json alone.

python benchmarks/random_checkpoint.py CONFIG.json DIRECTORY [--shards 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_kit.base.checks import read_config
from qlora_kit.base.meta_model import build_on_meta, expected_shapes

STD = 0.02


def make_checkpoint(config: Path, directory: Path, shards: int = 1, seed: int = 0) -> None:
    """Write weights drawn from N(0, 0.02), norms of ones, as `shards` files."""
    directory.mkdir(parents=True)
    shutil.copy(config, directory / "config.json")
    model = build_on_meta(read_config(directory), torch.bfloat16, directory / "config.json")
    shapes = expected_shapes(model)
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    names, where = list(shapes), {}
    generator = torch.Generator().manual_seed(seed)
    for number in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        tensors = {}
        for name in part:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            drawn = len(tensor.shape) > 1
            tensors[name] = (
                tensor.normal_(0, STD, generator=generator) if drawn else tensor.fill_(1)
            )
            where[name] = file
        save_file(tensors, directory / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


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

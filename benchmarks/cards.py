"""Which model fits which card, planned as `qlora-kit plan` plans.

For each model the longest rows that fit, up to its context, one row at a time, r 32 on all linears,
everything recomputed, as `qlora-kit plan --longest` finds them: the step on fake tensors for CUDA,
with the overhead that the plan counts and the margin that it leaves. Three ways: everything on the
device; the low-memory options that keep the base there, with a head in 4 bits; the base streamed
too. For each of the published shapes (`shapes/`) one row of 2,048 tokens, adapters on all linears,
and what of its weights stays in 16 bits. Writes results/cards.json and results/cards_shapes.json,
and the tables between the marks in README.md.

    python benchmarks/cards.py
    python benchmarks/cards.py --only shapes
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import make_parser, write_result

from qlora_kit.base.base import Base
from qlora_kit.base.config_only import open_shape
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import PLACED, TrainingConfig
from qlora_kit.device.found import OVERHEADS
from qlora_kit.options.checks import size_bytes
from qlora_kit.plan.longest import longest_rows
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner

MODELS = {
    "llama3.2-1b": "llama3_2_1b",
    "gemma2-2b": "gemma2_2b",
    "phi3.5-mini": "phi-3_5",
    "llama2-7b": "llama2_7b",
    "mistral-7b": "mistral_7b",
    "qwen2.5-7b": "qwen2_7b",
    "llama3.1-8b": "llama3_1_8b",
    "qwen3-8b": "qwen3_8b",
    "llama2-13b": "llama2_13b",
}
"""Short names, and the config.json files of the test material that have their shapes."""
CARDS = ("8GB", "12GB", "16GB", "24GB")
RANK = 32
WAYS = {
    "device": "on the device",
    "low_memory": "embedding and layers' inputs on the host, tiles, head in 4 bits",
    "streamed": "the base on the host too",
}
HOSTED = ("tiled_mlp", "offload_embedding", "offload_activations")
HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
SHAPES = HERE / "shapes"
SHAPE_CARDS = ("8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB")
TOKENS = 2048
LEVELS = ("full", "none")
NAMED = 0.01
"""Tensors of less than this share of a model's weights are not named, but counted."""


def longest_of(config: Path) -> dict[str, Any]:
    """Tokens of the longest rows by way and card (0 where none fit), and the model's context."""
    kept = dict.fromkeys(PLACED, False)
    placed = kept | dict.fromkeys(HOSTED, True)
    asked = {"device": (16, kept), "low_memory": (4, placed)}
    asked["streamed"] = 4, placed | {"offload_base": True}
    found: dict[str, Any] = {}
    for way, (head_bits, options) in asked.items():
        training = TrainingConfig(
            optim="paged_adamw_8bit", gradient_checkpointing="full", **options
        )
        base = BaseConfig(str(config), bits=4, head_bits=head_bits)
        lora = LoRAConfig(r=RANK, target_modules="all-linear")
        planner = Planner(base, lora, training, "cuda")
        row, most, (where,) = BatchShape(1, 2, 2), planner.run.context, planner.placements
        steps = training.gradient_accumulation_steps
        found["context"] = most
        found[way] = {
            card: longest_rows(planner, row, "full", size_bytes(card), where, steps, most).tokens
            for card in CARDS
        }
    return found


def fits(peak: int, card: str) -> bool:
    """Whether a run of this planned peak fits a card, by the rule of the plan."""
    overhead = OVERHEADS["cuda"]
    return peak - overhead.fixed <= overhead.room(size_bytes(card))


def table(found: dict[str, Any]) -> str:
    """Tokens of the longest row that fits, by model, way and card."""
    lines = [f"| model | what is where | {' | '.join(CARDS)} |", "|---|---|" + "---:|" * len(CARDS)]
    for model, one in found.items():
        for way, words in WAYS.items():
            cells = ((tokens, tokens == one["context"]) for tokens in one[way].values())
            shown = (f"{n:,}{' *' if is_all else ''}" if n else "-" for n, is_all in cells)
            lines.append(f"| {model} | {words} | {' | '.join(shown)} |")
    return "\n".join(lines)


def shape_of(config: Path) -> dict[str, Any]:
    """What one row takes of a published shape by level, and its weights, in bytes."""
    base = BaseConfig(str(config), bits=4)
    training = TrainingConfig(optim="paged_adamw_8bit")
    planner = Planner(base, LoRAConfig(target_modules="all-linear"), training, "cuda")
    plans = {level: planner.plan(BatchShape(1, TOKENS, TOKENS), level) for level in LEVELS}
    held = plans["full"].bytes
    opened = open_shape(base, torch.device("cuda"))
    return {
        "parameters": sum(math.prod(entry.shape) for entry in opened.entries.values()),
        "quantized_bytes": held["weights_quantized"],
        "other_bytes": held["weights_other"],
        "in_16_bits": in_16_bits(opened),
        "peak_bytes": {level: plan.peak_bytes for level, plan in plans.items()},
    }


def in_16_bits(base: Base) -> dict[str, int]:
    """Bytes of the tensors that are not quantized, by the last part of their modules' names."""
    quantized = decoder_linears(base.model).keys() - base.form.skipped
    found: collections.Counter[str] = collections.Counter()
    for name, entry in base.entries.items():
        owner = name.rpartition(".")[0]
        if owner not in quantized:
            found[owner.rpartition(".")[2]] += base.dtype.itemsize * math.prod(entry.shape)
    return dict(found.most_common())


def shapes_table(found: dict[str, Any]) -> str:
    """What each published shape takes, what of it is not quantized, and the card that it fits."""
    lines = [
        "| model | weights in 4 bits | in 16 bits | of them | peak, all recomputed | "
        "peak, nothing recomputed | smallest card |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for model, one in found.items():
        weights = one["quantized_bytes"] + one["other_bytes"]
        names = [name for name, size in one["in_16_bits"].items() if size >= NAMED * weights]
        share = one["other_bytes"] / weights
        full, none = (one["peak_bytes"][level] for level in LEVELS)
        card = next((card for card in SHAPE_CARDS if fits(full, card)), "-")
        cells = [
            model,
            gigabytes(one["quantized_bytes"]),
            f"{gigabytes(one['other_bytes'])} ({share:.0%})",
            ", ".join(names),
            *map(gigabytes, (full, none)),
            card,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    """Bytes as a card's maker counts them."""
    return f"{size / 1e9:.1f} GB"


def write_table(mark: str, lines: str) -> None:
    """Replace what stands between the marks of a table in README.md."""
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    PAGE.write_text(between.sub(lambda marks: f"{marks[1]}{lines}\n{marks[2]}", PAGE.read_text()))


def main() -> None:
    parser = make_parser(__doc__, "cards")
    parser.add_argument("--model", choices=MODELS, help="print one model's longest rows")
    parser.add_argument("--only", choices=("cards", "shapes"), help="one of the two tables")
    parser.add_argument("--workers", type=int, default=1, help="shapes planned at the same time")
    parser.add_argument("--shape", type=Path, help="plan one config.json and print what it takes")
    given = parser.parse_args()
    if given.shape:
        print(json.dumps(shape_of(given.shape)))
        return
    configs = Path(os.environ.get("QLORA_KIT_DATA", "")) / "configs"
    if given.model:
        print(json.dumps(longest_of(configs / f"{MODELS[given.model]}.json")))
        return
    found: dict[str, Any] = {}
    if given.only != "shapes":
        for model, name in MODELS.items():
            path = configs / f"{name}.json"
            found[model] = longest_of(path)
            print(model, found[model], flush=True)
        print(write_result(given, {"r": RANK, "cards": CARDS, "tokens": found}))
        write_table("cards", table(found))
    if given.only != "cards":
        paths = sorted(SHAPES.glob("*.json"))
        with ThreadPoolExecutor(given.workers) as workers:
            plans = dict(zip(paths, workers.map(planned_apart, paths), strict=True))
        shapes = {path.stem: found for path, found in plans.items()}
        print(write_result(given, {"tokens": TOKENS, "shapes": shapes}, "shapes"))
        write_table("shapes", shapes_table(shapes))


def planned_apart(config: Path) -> dict[str, Any]:
    """`shape_of` in a process of its own, whose memory ends with it."""
    command = [sys.executable, __file__, "--shape", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(config.stem, done.stdout.strip(), flush=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()

"""What a token of a long row takes at each moment of a step, by model, placement and interval.

Planned for CUDA as `qlora-kit plan` plans: every layer recomputes everything, rows of two lengths,
and of each interval of the step the slope between them. What does not grow with a row, such as
weights and a tile of tokens, is not in it; the checkpoints of all layers are. Takes a minute.

    python benchmarks/token_bytes.py
    python benchmarks/token_bytes.py --models llama3_1_8b
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import make_parser, write_result

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import PLACED, TrainingConfig
from qlora_kit.memory.counter import Interval
from qlora_kit.plan.plan import Planner

MODELS = "llama3_1_8b,qwen3_8b,llama2_13b,gemma2_2b,phi-3_5"
LENGTHS = (32768, 65536)
PLACEMENTS: dict[str, tuple[str, ...]] = {
    "on the card": (),
    "MLPs in tiles": ("tiled_mlp",),
    "and inputs of layers on the host": ("tiled_mlp", "offload_activations"),
}
"""Names in the result, and the options that are on."""


def token_bytes(config: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """The bytes of a token at the peak of each interval, and the largest of them."""
    training = TrainingConfig(
        optim="paged_adamw_8bit",
        gradient_checkpointing="full",
        **{name: name in options for name in PLACED},
    )
    lora = LoRAConfig(r=32, target_modules="all-linear")
    planner = Planner(BaseConfig(str(config), bits=4), lora, training, "cuda")
    short, long = (intervals_of(planner, length) for length in LENGTHS)
    found = {}
    for one, other in zip(short, long, strict=True):
        place = f"{one.phase}, {one.module}"
        found[place] = (other.peak - one.peak) / (LENGTHS[1] - LENGTHS[0])
    return {"placement": asdict(planner.placements[0]), "most": max(found.values()), "at": found}


def intervals_of(planner: Planner, length: int) -> list[Interval]:
    """The intervals of the passes of one row, every token of it trained on."""
    run = planner.run
    batches = run.micro_batches(1, length, length, 1)
    return run.passes(batches, ["full"] * len(run.layers))


def main() -> None:
    """Plan every model, print the table, and write it."""
    parser = make_parser(__doc__, "token_bytes")
    parser.add_argument("--models", default=MODELS, help="config.json files of the test material")
    given = parser.parse_args()
    configs, found = Path(os.environ["QLORA_KIT_DATA"]) / "configs", dict[str, Any]()
    for model in given.models.split(","):
        found[model] = {}
        for name, options in PLACEMENTS.items():
            found[model][name] = one = token_bytes(configs / f"{model}.json", options)
            highest = max(one["at"], key=one["at"].get)
            print(f"{model:14} {name:34} {one['most']:9,.0f} bytes a token: {highest}", flush=True)
    print(write_result(given, {"lengths": LENGTHS, "models": found}))


if __name__ == "__main__":
    main()

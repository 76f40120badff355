"""The modelled step of Llama-3.1-8B on three cards: ours, PEFT's, and the floor. No card is needed.

One row of 2,048 tokens, 4 bits, r 16 on all linears. Ours is the plan's step with the levels that
`auto` takes on the card, with torch's operations alone and with the Triton kernels; PEFT's is the
guide's way, with full checkpointing, traced likewise (`peers/peft_fake.py`). The floor is what no
program of these products escapes: each once, forward and backward, attention once, and the weight
read packed and written in 16 bits once a pass, at the same rates. All of it is the model of
`qlora_kit/plan/step_time.py`, which no card has been compared with. Writes results/step_time.json
and the table between the marks in README.md.

    python benchmarks/step_time.py                  # the config.json is in QLORA_KIT_DATA
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import peft_fake
from record import make_parser, write_result

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.cards import CARDS, Card
from qlora_kit.memory.counter import Interval
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.step_time import Clock, StepTime

PAGE = Path(__file__).resolve().parent / "README.md"
SHOWN = ("rtx3060", "rtx4090", "h100-sxm")
RANK, TOKENS = 16, 2048
PASSES = 3
"""Of dequantizing in the floor: forward, replay and backward."""


def ours(config: Path, card: Card, triton: bool) -> dict[str, Any]:
    """The plan's step on a card, with the levels that fit there."""
    training = TrainingConfig(
        optim="adamw", batch_size=1, gradient_accumulation_steps=1, triton_kernels=triton
    )
    base = BaseConfig(str(config), bits=4, dtype="bf16")
    lora = LoRAConfig(r=RANK, target_modules="all-linear")
    planner = Planner(base, lora, training, "cuda", clock=Clock(card))
    plan = planner.plan(BatchShape(1, TOKENS, TOKENS), "auto", card.memory_bytes)
    assert plan.time is not None
    run = planner.run
    alone = run.passes(run.micro_batches(1, TOKENS, TOKENS, 1), ["none"] * len(run.layers))
    return shown(plan.time, alone, run.names) | {"levels": plan.recompute}


def peft(config: Path, card: Card) -> dict[str, Any]:
    """The guide's step on a card, whether it fits there or not."""
    traced = peft_fake.traced(config, RANK, 1, TOKENS, "full", card.capability)
    names = list(dict.fromkeys(one.module for one in traced[0] if one.module.startswith("model.")))
    return shown(Clock(card).step(*traced, 1, TOKENS), traced[0], names) | {"levels": "full"}


def shown(time: StepTime, passes: Sequence[Interval], names: Sequence[str]) -> dict[str, Any]:
    """A step by kind, and the kernels of a layer in the middle, forward and backward."""
    kernels: collections.Counter[str] = collections.Counter()
    for one in passes:
        if one.module == names[len(names) // 2]:
            kernels[one.phase] += sum(work.kernels * n for work, n in one.work.items())
    return time.as_json() | {"kernels_of_a_layer": dict(kernels)}


def floor_s(config: Path, card: Card) -> float:
    """Products and attention of a step once, with ideal dequantizing; none of it overlaps."""
    planner = Planner(
        BaseConfig(str(config), bits=4, dtype="bf16"),
        LoRAConfig(r=RANK, target_modules="all-linear"),
        TrainingConfig(),
        "cuda",
        clock=Clock(card),
    )
    run = planner.run
    passes = run.passes(run.micro_batches(1, TOKENS, TOKENS, 1), ["none"] * len(run.layers))
    flops = sum(work.flops * n for one in passes for work, n in one.work.items())
    weights = planner.plan(BatchShape(1, TOKENS, TOKENS), "none").bytes["weights_quantized"]
    count = weights / (0.5 + 1 / 64 + 4 / (64 * 256))
    return float(flops / card.matmul_rate + PASSES * (weights + 2 * count) / card.memory_rate)


def table(found: dict[str, Any]) -> str:
    """A row for each card and side."""
    lines = [
        "| card | side | recompute | step | tokens/s | of PEFT's | of the floor | products, "
        "attention | dequantizing | elementwise | the rest | kernels of a layer |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for card, one in found.items():
        for side, step in one["sides"].items():
            parts = step["seconds"]
            rest = step["step_s"] - sum(
                parts[kind] for kind in ("matmul", "attention", "dequantize", "elementwise")
            )
            cells = [
                card,
                side,
                step["levels"],
                milliseconds(step["step_s"]),
                f"{step['tokens_per_s']:,.0f}",
                f"{step['step_s'] / one['sides']['PEFT']['step_s']:.2f}",
                f"{step['step_s'] / one['floor_s']:.2f}",
                milliseconds(parts["matmul"] + parts["attention"]),
                milliseconds(parts["dequantize"]),
                milliseconds(parts["elementwise"]),
                milliseconds(rest),
                " + ".join(str(count) for count in step["kernels_of_a_layer"].values()),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """For a table."""
    return f"{seconds * 1e3:,.0f} ms"


def main() -> None:
    parser = make_parser(__doc__, "step_time")
    default = Path(os.environ.get("QLORA_KIT_DATA", "")) / "configs/llama3_1_8b.json"
    parser.add_argument("--model", type=Path, default=default, help="a config.json")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in SHOWN:
        card = CARDS[name]
        sides = {
            "ours, torch": ours(given.model, card, triton=False),
            "ours, Triton": ours(given.model, card, triton=True),
            "PEFT": peft(given.model, card),
        }
        found[name] = {"sides": sides, "floor_s": floor_s(given.model, card)}
        print(name, {side: round(one["step_s"], 4) for side, one in sides.items()}, flush=True)
    print(write_result(given, {"model": given.model.stem, "tokens": TOKENS, "cards": found}))
    between = re.compile(r"(<!-- step_time -->\n).*?(<!-- /step_time -->)", re.S)
    made = between.sub(lambda marks: f"{marks[1]}{table(found)}\n{marks[2]}", PAGE.read_text())
    PAGE.write_text(made)


if __name__ == "__main__":
    main()

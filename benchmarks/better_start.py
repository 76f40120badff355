"""Held-out loss from two starts of the adapters at 4 bits: B = 0, or B A = what quantizing lost.

The second start is the best fit of rank r of W - dequant(Q(W)), by a singular value decomposition
in fp32, divided between A and B, the quantized base untouched (the first step of LoftQ, arXiv
2310.08659). Both train the same batches in the same order with the same optimizer, rate and steps;
the seed decides A of the default start and the order of the rows. The held-out loss is taken at the
start, after a tenth of the steps, in the middle and at the end; that of the 16-bit base, before
training, says what there is to win.

    OMP_NUM_THREADS=1 QLORA_KIT_DATA=... nice python benchmarks/better_start.py
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from record import make_parser, provenance, write_result
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.linear import dequantize
from qlora_kit.base.load import load_base
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import eval_batches, padding_id
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodedRows
from qlora_kit.data.rows import load_rows
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.lora.inject import ADAPTER, inject_lora, lora_layers
from qlora_kit.training.loop import train
from qlora_kit.training.loss import evaluate
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

STARTS = ("default", "fit")
RANKS = (16, 8)
DATA = Path(os.environ.get("QLORA_KIT_DATA", ""))
LENGTH, EVAL_ROWS = 512, 8
PARTS = (1 / 10, 1 / 2, 1)
"""Parts of the steps after which the held-out loss is taken."""
WHEN = ("start", "a tenth", "the middle", "end")


class Task(NamedTuple):
    """A model and what it is trained on, with its rows a step, learning rate and steps."""

    model: str
    data: str
    rows: int
    learning_rate: float
    steps: int


TASKS = {
    "tiny": Task("tiny", "sample:extract", 16, 5e-3, 30),
    "stories260K": Task(
        str(DATA / "models" / "stories260K"), str(DATA / "text" / "wikisql"), 8, 2e-3, 50
    ),
}
KEY = ("task", "r", "start", "seed")


class Rows(NamedTuple):
    """The rows of a task as tokens."""

    train: EncodedRows
    held_out: EncodedRows


def encoded(task: Task, base: Base) -> Rows:
    """The rows of a task, the same for every seed."""
    rows = load_rows(DataConfig(data=task.data), 42)
    length = min(LENGTH, base.context)
    return Rows(
        *(encode_rows(part, base.tokenizer, length) for part in (rows.train, rows.evaluation))
    )


def held_out_loss(base: Base, rows: Rows) -> float:
    batches = eval_batches(rows.held_out.rows, EVAL_ROWS, padding_id(base.tokenizer))
    return evaluate(base.model, batches).loss


def linears(base: Base) -> dict[str, Tensor]:
    """The weights of a base that is not quantized, in fp32, by module name."""
    modules = base.model.named_modules()
    return {name: m.weight.detach().float() for name, m in modules if isinstance(m, nn.Linear)}


def fit_start(base: Base, originals: dict[str, Tensor]) -> dict[str, float]:
    """Set A and B of every layer to the best fit of what quantizing lost; what of it is left.

    Gives the mean over layers of ||R - scaling B A|| / ||R|| for R = W - dequant(Q(W)).
    """
    left = []
    for name, layer in lora_layers(base.model).items():
        lora_a, lora_b = layer.weights(ADAPTER)
        lost = originals[name] - dequantize(layer.base_layer, base.dtype).float()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        r = len(lora_a)
        root = (s[:r] / layer.scaling[ADAPTER]).sqrt()
        lora_a.data.copy_(root.unsqueeze(1) * vh[:r])
        lora_b.data.copy_(u[:, :r] * root)
        left.append(float(s[r:].square().sum().sqrt() / s.square().sum().sqrt()))
    return {"residual_left": mean(left)}


def run(name: str, r: int, start: str, seed: int) -> dict[str, Any]:
    """One training run: its held-out losses at the times of `WHEN`."""
    task = TASKS[name]
    base = load_base(task.model, bits=4, device="cpu")
    rows = encoded(task, base)
    inject_lora(base.model, LoRAConfig(r=r, alpha=2 * r, target_modules="all-linear"), seed=seed)
    found: dict[str, Any] = {}
    if start == "fit":
        found |= fit_start(base, linears(load_base(task.model, bits=16, dtype="fp32")))
    training = TrainingConfig(
        batch_size=task.rows,
        gradient_accumulation_steps=1,
        learning_rate=task.learning_rate,
        max_steps=task.steps,
        gradient_checkpointing="none",
        optim="adamw",
    )
    prepare_model(base.model, training, ["none"] * base.model.config.num_hidden_layers, False)
    optimizer = make_optimizer("adamw", base.model.parameters(), task.learning_rate, 0.0)
    schedule = StepSchedule(
        rows=rows.train.rows,
        batch_size=task.rows,
        num_steps=task.steps,
        seed=seed,
        pad_id=padding_id(base.tokenizer),
    )
    losses = [held_out_loss(base, rows)]
    batches = iter(schedule)
    for before, step in itertools.pairwise((0, *(round(task.steps * part) for part in PARTS))):
        train(base.model, itertools.islice(batches, step - before), optimizer)
        losses.append(held_out_loss(base, rows))
    return found | {"losses": losses}


def unquantized_loss(name: str) -> float:
    """The held-out loss of the 16-bit base before any training."""
    base = load_base(TASKS[name].model, bits=16, device="cpu")
    return held_out_loss(base, encoded(TASKS[name], base))


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task and rank both starts: mean losses, the seeds' spread, the mean difference."""
    rows = []
    for name, r in itertools.product(TASKS, RANKS):
        by_start = {
            start: {
                run["seed"]: run["losses"]
                for run in runs
                if (run["task"], run["r"], run["start"]) == (name, r, start)
            }
            for start in STARTS
        }
        both = sorted(by_start["default"].keys() & by_start["fit"].keys())
        if not both:
            continue
        row: dict[str, Any] = {"task": name, "r": r, "seeds": both}
        for place, when in enumerate(WHEN):
            values = {start: [by_start[start][seed][place] for seed in both] for start in STARTS}
            row[when] = {start: mean(of) for start, of in values.items()}
            if len(both) > 1:
                row[when]["spread"] = {start: stdev(of) for start, of in values.items()}
            row[when]["fit - default"] = [b - a for a, b in zip(*values.values(), strict=True)]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    for row in rows:
        for when in WHEN:
            found = row[when]
            means = ", ".join(f"{start} {found[start]:.4f}" for start in STARTS)
            differences = ", ".join(f"{one:+.4f}" for one in found["fit - default"])
            print(f"{row['task']} r {row['r']} {when}: {means}; fit - default {differences}")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "better_start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    return parser.parse_args()


def main() -> None:
    given = parse()
    measured = {
        "settings": {
            name: task._asdict() | {"model": name, "data": Path(task.data).name}
            for name, task in TASKS.items()
        },
        "targets": "all-linear",
        "unquantized": {name: unquantized_loss(name) for name in TASKS},
    }
    commit, runs = provenance()["commit"], list[dict[str, Any]]()
    # Both starts in turn: what an interrupted run leaves compares them all the same.
    for r, seed, name, start in itertools.product(RANKS, given.seeds, TASKS, STARTS):
        case = dict(zip(KEY, (name, r, start, seed), strict=True))
        runs.append({**case, **run(name, r, start, seed)})
        print(runs[-1], flush=True)
        result = {**measured, "commit": commit, "runs": runs, "table": table(runs)}
        path = write_result(given, result)
    show(table(runs))
    print(path)


if __name__ == "__main__":
    main()

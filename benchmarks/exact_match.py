"""Answers that equal the completion, before and after training: the real commands, the tiny base.

Trains the package's tiny base in 4 bits on each data set and lets `evaluate` answer held-out
prompts greedily with the base alone and with the adapter, for three seeds of adapter and order.
WikiSQL is read from QLORA_KIT_DATA, and its test rows are asked, which no choice was made on. About
twenty minutes on a core.

    OMP_NUM_THREADS=1 python benchmarks/exact_match.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import make_parser, write_result

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "--bits 4 --target_modules all-linear --batch_size 16 --gradient_accumulation_steps 1 "
    "--learning_rate 5e-3 --warmup_steps 5 --gradient_checkpointing none"
)
WIKISQL = "WikiSQL"
DATA = ("sample:extract", "sample:query", WIKISQL)


def run(command: str, *arguments: str) -> str:
    """What a command of the package prints."""
    done = subprocess.run(
        [sys.executable, f"scripts/{command}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def evaluated(asked: str, *adapter: str) -> dict[str, Any]:
    """The loss and the right answers on held-out rows."""
    answer = json.loads(
        run("evaluate", "--model", "tiny", "--bits", "4", "--data", asked, *adapter, "--json")
    )
    return {name: answer[name] for name in ("loss", "right", "asked", "exact_match")}


def measure(name: str, steps: int, seeds: Sequence[int], directory: Path) -> list[dict[str, Any]]:
    """One data set: the base, and by seed the seconds of training and the adapter."""
    trained = asked = name
    if name == WIKISQL:
        trained = os.path.join(os.environ["QLORA_KIT_DATA"], "text", "wikisql")
        asked = os.path.join(trained, "test.jsonl")
    before = evaluated(asked)
    rows = []
    for seed in seeds:
        output = str(directory / f"{name}-{seed}".replace(":", "-"))
        arguments = ["--model", "tiny", "--data", trained, "--max_steps", str(steps)]
        arguments += ["--seed", str(seed), "--output_dir", output]
        began = time.perf_counter()
        run("finetune", *arguments, *SETTINGS.split())
        train_s = round(time.perf_counter() - began, 1)
        after = evaluated(asked, "--adapter", output)
        print(
            f"{name:<15} seed {seed}: {before['right']} of {before['asked']} before, "
            f"{after['right']} after; loss {before['loss']:.3f} -> {after['loss']:.3f}; "
            f"trained in {train_s} s",
            flush=True,
        )
        row = {"data": name, "seed": seed, "train_s": train_s, "base": before, "adapter": after}
        rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__, "exact_match")
    parser.add_argument("--data", nargs="+", default=DATA, choices=DATA)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", nargs="+", type=int, default=(42, 43, 44))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            row
            for name in arguments.data
            for row in measure(name, arguments.steps, arguments.seeds, Path(directory))
        ]
    print(write_result(arguments, {"settings": SETTINGS, "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()

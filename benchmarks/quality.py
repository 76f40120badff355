"""Held-out loss after equal training at 16, 8 and 4 bits: the real command, several seeds.

Trains stories260K on WikiSQL (completion only) with the settings below and reads the held-out loss
from each run's `run.json`. Needs QLORA_KIT_DATA. A run takes about two minutes on a core; each is
written to the result, with its commit, when it ends, and one that is there is not repeated.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --jobs 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from record import RESULTS, provenance, write_result

SETTINGS = (
    "--batch_size 8 --gradient_accumulation_steps 1 --max_steps 300 --learning_rate 2e-3 "
    "--lr_scheduler_type constant --warmup_steps 0 --optim adamw --max_length 512 "
    "--gradient_checkpointing none"
)
TARGETS = ("auto", "all-linear")


def held_out_loss(bits: int, targets: str, seed: int, directory: Path) -> float:
    """Train once with the command; the held-out loss afterwards, in nats a supervised token."""
    data = Path(os.environ["QLORA_KIT_DATA"])
    output = directory / f"{bits}-{targets}-{seed}"
    command = [sys.executable, "scripts/finetune.py"]
    command += ["--model", str(data / "models/stories260K"), "--data", str(data / "text/wikisql")]
    command += [*SETTINGS.split(), "--bits", str(bits), "--target_modules", targets]
    command += ["--seed", str(seed), "--output_dir", str(output)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    loss = json.loads((output / "run.json").read_text())["eval"]["loss_after"]
    print(f"{bits:>2} bits  {targets:<10}  seed {seed}  {loss:.4f}", flush=True)
    return float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4, 8])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    path = RESULTS / "quality.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(run["bits"], run["targets"], run["seed"]) for run in runs}
    wanted = itertools.product(arguments.bits, TARGETS, arguments.seeds)
    commit = provenance()["commit"]
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        started = {
            pool.submit(held_out_loss, *case, Path(directory)): case
            for case in wanted
            if case not in done
        }
        for ended in as_completed(started):
            names = dict(zip(("bits", "targets", "seed"), started[ended], strict=True))
            runs.append({**names, "loss": ended.result(), "commit": commit})
            write_result("quality", {"settings": SETTINGS, "runs": runs, "table": table(runs)})
    for row in table(runs):
        print(
            f"{row['bits']:>2} bits  {row['targets']:<10}  mean {row['mean']:.3f}  {row['seeds']}"
        )
    print(path)


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean loss of each number of bits and choice of targets, over the seeds that were run."""
    rows = []
    for bits, targets in itertools.product((16, 8, 4), TARGETS):
        own = [run for run in runs if (run["bits"], run["targets"]) == (bits, targets)]
        if own:
            seeds = sorted(run["seed"] for run in own)
            loss = mean(run["loss"] for run in own)
            rows.append({"bits": bits, "targets": targets, "seeds": seeds, "mean": loss})
    return rows


if __name__ == "__main__":
    main()

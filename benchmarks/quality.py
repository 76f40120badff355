"""Held-out loss after equal training at 16, 8 and 4 bits: the real command, several seeds.

Trains stories260K on WikiSQL (completion only) with the settings below and reads the held-out loss
from each run's `run.json`. Needs QLORA_KIT_DATA. Takes about 20 minutes on 2 cores.

    python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from record import write_result

SETTINGS = (
    "--batch_size 8 --gradient_accumulation_steps 1 --max_steps 300 --learning_rate 2e-3 "
    "--lr_scheduler_type constant --warmup_steps 0 --optim adamw --max_length 512"
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
    cases = list(itertools.product(arguments.bits, TARGETS, arguments.seeds))
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        losses = list(pool.map(lambda case: held_out_loss(*case, Path(directory)), cases))
    table = []
    for bits, targets in itertools.product(arguments.bits, TARGETS):
        own = [
            loss for case, loss in zip(cases, losses, strict=True) if case[:2] == (bits, targets)
        ]
        table.append({"bits": bits, "targets": targets, "losses": own, "mean": mean(own)})
    for row in table:
        print(f"{row['bits']:>2} bits  {row['targets']:<10}  mean {row['mean']:.3f}")
    path = write_result("quality", {"settings": SETTINGS, "seeds": arguments.seeds, "table": table})
    print(path)


if __name__ == "__main__":
    main()

"""How long `qlora-kit plan` takes for a large model, as a user starts it.

Each command is a process of its own, imports included, and run several times in turns with a
process that imports alone; medians. One plan, and one with levels chosen by budget, suggestions and
the table of batch and length.

    python benchmarks/plan_time.py                  # Llama 2 70B, from QLORA_KIT_DATA
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import make_parser, write_result

COMMAND = str(Path(__file__).resolve().parent.parent / "scripts" / "plan.py")
IMPORTS = "import torch, transformers.modeling_utils, bitsandbytes"
PLAN = "--bits 4 --device_memory 48GB --max_length 512 --gradient_checkpointing full --json"
ALL = "--bits 4 --device_memory 48GB --max_length 2048 --batch_size 4 --grid --json"


def timed(*command: str) -> tuple[float, str]:
    """The seconds of a Python process, and what it prints."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def main() -> None:
    parser = make_parser(__doc__, "plan_time")
    data = os.environ.get("QLORA_KIT_DATA", "")
    default = Path(data) / "configs/llama2_70b.json"
    parser.add_argument("--model", type=Path, default=default, help="a config.json")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    commands = {"imports": ["-c", IMPORTS]}
    for name, options in (("plan", PLAN), ("auto, suggestions, grid", ALL)):
        commands[name] = [COMMAND, "--model", str(given.model), *options.split()]
    timed("-c", IMPORTS)  # from here on the files are in the page cache
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    printed: dict[str, str] = {}
    for _ in range(given.runs):
        for name, command in commands.items():
            taken, printed[name] = timed(*command)
            seconds[name].append(round(taken, 2))
            print(name, seconds[name], flush=True)
    results: dict[str, Any] = {"model": given.model.stem}
    for name, command in commands.items():
        results[name] = {"median_s": statistics.median(seconds[name]), "runs_s": seconds[name]}
        if printed[name]:
            found = json.loads(printed[name])
            results[name] |= {
                "options": " ".join(command[3:]),
                "peak_bytes": found["peak_bytes"],
                "suggestions": [one["change"] for one in found["suggestions"]],
                "cells": len(found.get("grid", ())),
            }
    print(write_result(given, results))


if __name__ == "__main__":
    main()

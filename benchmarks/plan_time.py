"""How long `qlora-kit plan` takes for a large model, as a user starts it.

Each command is a process of its own, imports included; the seconds of importing alone stand beside
them. One plan, and one with levels chosen by budget, suggestions and the table of batch and length.

    python benchmarks/plan_time.py                  # Llama 2 70B, from QLORA_KIT_DATA
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import write_result

COMMAND = str(Path(__file__).resolve().parent.parent / "scripts" / "plan.py")
IMPORTS = "import torch, transformers.modeling_utils, bitsandbytes"
PLAN = "--bits 4 --device_memory 48GB --max_length 512 --gradient_checkpointing full --json"
ALL = "--bits 4 --device_memory 48GB --max_length 2048 --batch_size 4 --grid --json"


def timed(*command: str) -> dict[str, Any]:
    """The seconds of a Python process, and what it prints as JSON."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(done.stdout) if done.stdout else {}
    return {"wall_s": round(wall, 2), "processor_s": round(used, 2), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("QLORA_KIT_DATA", "")
    default = Path(data) / "configs/llama2_70b.json"
    parser.add_argument("--model", type=Path, default=default, help="a config.json")
    parser.add_argument("--result", default="plan_time")
    given = parser.parse_args()
    timed("-c", IMPORTS)  # from here on the files are in the page cache
    results: dict[str, Any] = {"model": given.model.stem, "imports": timed("-c", IMPORTS)}
    for name, options in (("plan", PLAN), ("auto, suggestions, grid", ALL)):
        taken = timed(COMMAND, "--model", str(given.model), *options.split())
        found = taken.pop("found")
        results[name] = {
            **taken,
            "options": options,
            "peak_bytes": found["peak_bytes"],
            "suggestions": [one["change"] for one in found["suggestions"]],
            "cells": len(found.get("grid", ())),
        }
        print(name, results[name], flush=True)
    results["imports"].pop("found")
    print(write_result(given.result, results))


if __name__ == "__main__":
    main()

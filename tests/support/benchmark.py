"""A script of `benchmarks/`, run small and for its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from warm_python import warm_python

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_benchmark(
    name: str, results: Path, *arguments: object, warm: bool = True
) -> dict[str, Any]:
    """Run `benchmarks/NAME.py` on one thread of the CPU; what it wrote into `results`.

    Not `warm` where it measures what a process takes from its first moment.
    """
    done = subprocess.run(
        [
            *(
                warm_python() if warm else sys.executable,
                str(BENCHMARKS / f"{name}.py"),
                "--results",
                str(results),
            ),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return result

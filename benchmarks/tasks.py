"""One base, many tasks: each adapter on its own task and on the others', switched in one process.

Trains an adapter for each of three tasks with the ordinary command, on the package's tiny base in 4
bits: the two samples, and WikiSQL, which is read from QLORA_KIT_DATA. Then `evaluate` takes all of
them at once and answers each task's held-out rows greedily with the base and with every adapter.
Each is also evaluated alone on its own task: switching must not change a figure. Deterministic with
one thread. About five minutes on a core.

    OMP_NUM_THREADS=1 python benchmarks/tasks.py
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from exact_match import SETTINGS, run
from record import make_parser, write_result

ASKED = "--batch_size 50 --max_new_tokens 128"
TASKS = ("extract", "query", "wikisql")
FIGURES = ("loss", "tokens", "right", "asked", "exact_match")


def data_of(task: str) -> tuple[str, str]:
    """What a task is trained on, and its held-out rows."""
    if task == "wikisql":
        directory = Path(os.environ["QLORA_KIT_DATA"], "text", "wikisql")
        return str(directory), str(directory / "test.jsonl")
    return f"sample:{task}", f"sample:{task}"


def train(task: str, steps: int, output: Path) -> float:
    """Train the adapter of a task; the seconds of it."""
    began = time.perf_counter()
    arguments = ["--model", "tiny", "--data", data_of(task)[0], "--max_steps", str(steps)]
    run("finetune", *arguments, *SETTINGS.split(), "--output_dir", str(output))
    return round(time.perf_counter() - began, 1)


def evaluated(task: str, *adapters: str) -> list[dict[str, Any]]:
    """What `evaluate` says on the held-out rows of a task: of one adapter, or base and several."""
    flags = [flag for adapter in adapters for flag in ("--adapter", adapter)]
    asked = ["--data", data_of(task)[1], *ASKED.split(), "--json"]
    said = json.loads(run("evaluate", *flags, *asked))
    return said if isinstance(said, list) else [said]


def main() -> None:
    parser = make_parser(__doc__, "tasks")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--steps", type=int, default=120, help="of each task (%(default)s)")
    arguments = parser.parse_args()
    tasks, trained, rows = arguments.tasks, {}, []
    with tempfile.TemporaryDirectory() as directory:
        for task in tasks:
            seconds = train(task, arguments.steps, Path(directory, task))
            trained[task] = {"steps": arguments.steps, "train_s": seconds}
            print(f"{task:<8} trained in {seconds} s", flush=True)
        for task in tasks:
            named = [f"{name}={Path(directory, name)}" for name in tasks]
            for report in evaluated(task, *named):
                found = {name: report[name] for name in FIGURES}
                row = {"adapter": report["adapter"] or "base", "task": task, **found}
                if report["adapter"] == task:
                    (alone,) = evaluated(task, str(Path(directory, task)))
                    row["equal_alone"] = {name: alone[name] for name in FIGURES} == found
                rows.append(row)
                print(
                    f"{row['adapter']:<8} on {task:<8} {row['right']} of {row['asked']} right, "
                    f"loss {row['loss']:.4f}",
                    flush=True,
                )
    result = {"settings": SETTINGS, "asked": ASKED, "trained": trained, "rows": rows}
    print(write_result(arguments, result))


if __name__ == "__main__":
    main()

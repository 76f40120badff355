"""What the default job makes of a machine that is busy with something else, and of a quiet one.

The default job's training, `finetune` without a flag, in tokens a second: alone and beside a
process that never stops, with threads that wait as qlora_kit lets them (passively), as OpenMP lets
them where nobody says anything, after some spinning, and with one thread. Every side takes its turn
in each round; medians of the ratios over rounds. About 5 minutes on 2 cores, most of it for the
side that spins beside the busy process.

    python benchmarks/busy_machine.py
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from record import make_parser, write_result

ROOT = Path(__file__).resolve().parent.parent
SIDES: dict[str, dict[str, str]] = {
    "passive": {},
    # What libgomp does of its own accord where there are cores for all threads.
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "spinning shortly": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS, BEFORE = "passive", "spinning"


def tokens_per_s(environment: dict[str, str], steps: int) -> float:
    """Train the default job for some steps in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        command = [
            *(sys.executable, str(ROOT / "scripts" / "finetune.py"), "--output_dir", str(output)),
            *("--max_steps", str(steps), "--no_compare_bits", "--sample_prompts", "0"),
            *("--eval_fraction", "0", "--config", str(ROOT / "qlora_kit/assets/quickstart.yaml")),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**clean, **environment}, check=False
        )
        assert done.returncode == 0, done.stderr
        return float(json.loads((output / "run.json").read_text())["train"]["tokens_per_s"])


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never stop, at the priority of this one."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main() -> None:
    parser = make_parser(__doc__, "busy_machine")
    parser.add_argument("--steps", type=int, default=10, help="steps of the default job")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    arguments = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = {}
    for number in range(arguments.rounds):
        for place, processes in (("quiet", 0), ("busy", 1)):
            sides = arguments.sides[number % len(arguments.sides) :]
            sides += arguments.sides[: number % len(arguments.sides)]
            for side in sides:
                with busy(processes):
                    speed = tokens_per_s(SIDES[side], arguments.steps)
                measured.setdefault(place, {}).setdefault(side, []).append(round(speed, 1))
                print(f"round {number + 1}, {place}, {side}: {speed:.0f} tokens/s", flush=True)
    result: dict[str, object] = {"steps": arguments.steps, "tokens_per_s": measured}
    if {OURS, BEFORE} <= set(arguments.sides):
        result["passive_to_spinning"] = {
            place: round(
                statistics.median(
                    ours / before for ours, before in zip(one[OURS], one[BEFORE], strict=True)
                ),
                3,
            )
            for place, one in measured.items()
        }
        print(result["passive_to_spinning"])
    print(write_result(arguments, result))


if __name__ == "__main__":
    main()

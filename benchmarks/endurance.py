"""A long run: does memory grow, is anything left behind, and what does saving cost?

2,000 steps of the real command on `tiny` with a checkpoint every 10 steps and an evaluation every
500. The slope is that of a straight line through the process's resident set after step 100. The
share of saving is that of one save in 100 steps of the default job (`--model tiny`, its sample,
all defaults), of which a few are run. About 10 minutes on 2 cores.

    OMP_NUM_THREADS=1 python benchmarks/endurance.py
"""

from __future__ import annotations

import array
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from record import make_parser, write_result  # noqa: E402

from qlora_kit.commands.finetune import main as finetune  # noqa: E402
from qlora_kit.run import opening  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE")
FIRST_STEP = 100
SAVE_EVERY = 100
"""Steps between two saves, of which the share is reported."""


class Watched(opening.Run):
    """A run that notes its memory and files after each step, and the time of each save."""

    resident: array.array[int]
    files: array.array[int]
    step_s: array.array[float]
    save_s: array.array[float]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Eight bytes an entry: what watches is not to be what grows.
        Watched.resident, Watched.files = array.array("q"), array.array("q")
        Watched.step_s, Watched.save_s = array.array("d"), array.array("d")
        save = self.state.save

        def timed() -> Path | None:
            began = time.perf_counter()
            path = save()
            self.save_s.append(time.perf_counter() - began)
            return path

        self.state.save = timed  # type: ignore[method-assign]

    def on_step(self, report: Any) -> None:
        """As ever; then look at the process."""
        super().on_step(report)
        self.step_s.append(report.seconds)
        with open("/proc/self/statm") as file:
            self.resident.append(int(file.read().split()[1]) * PAGE)
        self.files.append(len(os.listdir("/proc/self/fd")))


def slope(values: array.array[int]) -> float:
    """Bytes a step of the straight line through `values`."""
    return statistics.linear_regression(range(len(values)), values).slope


def command(*arguments: str) -> None:
    code = finetune(["--device", "cpu", *arguments])
    if code:
        raise RuntimeError(f"the run ended with {code}")


def long_run(directory: Path, steps: int, saves: int) -> dict[str, Any]:
    """Many steps and saves; what they left."""
    output = directory / "long"
    settings = "--max_length 128 --batch_size 1 --gradient_accumulation_steps 1 --eval_steps 500"
    command(
        *("--model", "tiny", "--output_dir", str(output), *settings.split()),
        *("--max_steps", str(steps), "--save_steps", str(steps // saves)),
    )
    after = Watched.resident[FIRST_STEP:]
    return {
        "steps": steps,
        "saves": len(Watched.save_s),
        "slope_bytes_a_step": round(slope(after), 1),
        "resident_bytes": {"step_100": after[0], "last": after[-1]},
        "open_files": {"step_100": Watched.files[FIRST_STEP], "last": Watched.files[-1]},
        "left_in_directory": sorted(path.name for path in output.iterdir()),
        "save_s": round(statistics.median(Watched.save_s), 4),
        "step_s": round(statistics.median(Watched.step_s), 4),
    }


def default_job(directory: Path, steps: int) -> dict[str, Any]:
    """What one save takes beside the steps between two, at the default settings."""
    output = directory / "default"
    often = ("--max_steps", str(steps), "--save_steps", "4", "--output_dir", str(output))
    command("--model", "tiny", *often)
    step_s, save_s = statistics.median(Watched.step_s), statistics.median(Watched.save_s)
    return {
        "steps": steps,
        "step_s": round(step_s, 4),
        "save_s": round(save_s, 4),
        "share_of_saving": round(save_s / (SAVE_EVERY * step_s + save_s), 5),
    }


def main() -> None:
    parser = make_parser(__doc__, "endurance")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--saves", type=int, default=200)
    arguments = parser.parse_args()
    opening.Run = Watched  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as name:
        long = long_run(Path(name), arguments.steps, arguments.saves)
        default = default_job(Path(name), 40)
    print(write_result(arguments, {"long_run": long, "default_job": default}))


if __name__ == "__main__":
    main()

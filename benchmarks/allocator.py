"""What `auto` reserves of a card, by an allocator simulated from the sizes of planned steps.

    python benchmarks/allocator.py

A plan counts tensors; a card has to hold segments, in which there are holes. For 40 settings of
models, adapters, rows and cards, each planned with `--gradient_checkpointing auto` for the whole
card, everything that loading and two steps allocate and free is replayed, in order, by the rules of
torch's caching allocator (`tests/support/caching_allocator.py`), with expandable segments as the
commands set them and without. What is reserved at most has to stay below the card less the CUDA
context. Sizes inside kernels are not known here, nor are modules that are loaded late. Needs the
config.json files of the test material. Writes results/allocator.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

from caching_allocator import CachingAllocator, FullError  # noqa: E402
from recorded_run import RecordedRun, recording, reserved  # noqa: E402

from qlora_kit.config.base import BaseConfig  # noqa: E402
from qlora_kit.config.lora import LoRAConfig  # noqa: E402
from qlora_kit.config.training import TrainingConfig  # noqa: E402
from qlora_kit.device.found import OVERHEADS  # noqa: E402
from qlora_kit.options.checks import size_bytes  # noqa: E402
from qlora_kit.plan.memory_plan import BatchShape  # noqa: E402
from qlora_kit.plan.plan import Planner  # noqa: E402

SETTINGS: tuple[tuple[str, str, int, tuple[tuple[str, int, int], ...]], ...] = (
    (
        "llama3_2_1b",
        "all-linear",
        16,
        (
            ("8GB", 1, 8192),
            ("8GB", 2, 4096),
            ("12GB", 4, 4096),
            ("16GB", 2, 16384),
            ("24GB", 16, 2048),
        ),
    ),
    (
        "gemma2_2b",
        "auto",
        64,
        (
            ("8GB", 1, 2048),
            ("12GB", 4, 1024),
            ("12GB", 1, 4096),
            ("16GB", 4, 2048),
            ("24GB", 2, 4096),
        ),
    ),
    (
        "phi-3_5",
        "all-linear",
        8,
        (
            ("8GB", 1, 4096),
            ("12GB", 4, 1024),
            ("12GB", 1, 8192),
            ("16GB", 2, 4096),
            ("24GB", 4, 4096),
        ),
    ),
    (
        "llama2_7b",
        "auto",
        16,
        (
            ("8GB", 1, 1024),
            ("8GB", 1, 2048),
            ("12GB", 2, 2048),
            ("16GB", 4, 2048),
            ("24GB", 8, 1024),
        ),
    ),
    (
        "mistral_7b",
        "all-linear",
        16,
        (
            ("8GB", 1, 2048),
            ("12GB", 1, 4096),
            ("16GB", 1, 8192),
            ("16GB", 8, 512),
            ("24GB", 1, 16384),
        ),
    ),
    (
        "qwen2_7b",
        "all-linear",
        32,
        (
            ("8GB", 1, 1024),
            ("12GB", 1, 2048),
            ("12GB", 1, 4096),
            ("16GB", 2, 4096),
            ("24GB", 1, 16384),
        ),
    ),
    (
        "llama3_1_8b",
        "all-linear",
        16,
        (
            ("8GB", 1, 512),
            ("12GB", 1, 2048),
            ("12GB", 1, 4096),
            ("16GB", 4, 2048),
            ("24GB", 8, 2048),
        ),
    ),
    (
        "qwen3_8b",
        "auto",
        16,
        (
            ("8GB", 1, 512),
            ("12GB", 4, 512),
            ("12GB", 1, 2048),
            ("16GB", 1, 8192),
            ("24GB", 4, 4096),
        ),
    ),
)
"""A model's config.json, the linears with adapters, their rank; cards, rows and their length."""


class Runs:
    """The recorded runs of a base and its adapters, one for each optimizer that `auto` may take."""

    def __init__(self, base: BaseConfig, lora: LoRAConfig) -> None:
        self._base, self._lora = base, lora
        self.planner = Planner(base, lora, TrainingConfig(), "cuda")
        self._made: dict[str, RecordedRun] = {}

    def of(self, optim: str) -> RecordedRun:
        """The run with this optimizer, whose loading has its states and no others."""
        if optim not in self._made:
            with recording():
                training = TrainingConfig(optim=optim)
                self._made[optim] = RecordedRun(Planner(self._base, self._lora, training, "cuda"))
        return self._made[optim]


def simulated(runs: Runs, card: str, rows: int, length: int) -> dict[str, Any]:
    """The plan of `auto` for a whole card, and what its steps reserve there."""
    budget, shape = size_bytes(card), BatchShape(rows, length, length)
    plan = runs.planner.plan(shape, "auto", budget)
    run = runs.of(plan.optim)
    step = run.step(shape, plan)
    room = budget - OVERHEADS["cuda"].fixed
    found: dict[str, Any] = {
        "card": card,
        "rows": rows,
        "length": length,
        "optim": plan.optim,
        "levels": plan.recompute,
        "fits": plan.fits,
        "planned_bytes": plan.peak_bytes,
        "planned_tensors": plan.peak_bytes - OVERHEADS["cuda"].fixed,
        "margin_bytes": plan.margin_bytes,
        "room_bytes": room,
    }
    for expandable in (True, False):
        name = "expandable" if expandable else "segments"
        endless = CachingAllocator(expandable=expandable)
        found[f"reserved_{name}"] = reserved(run.loading, [step, step], endless)
        found["allocated"] = endless.peak_allocated
        try:
            reserved(run.loading, [step, step], CachingAllocator(room, expandable=expandable))
            found[f"holds_{name}"] = True
        except FullError:
            found[f"holds_{name}"] = False
    return found


def main() -> None:
    """Replay all settings, model by model."""
    parser = record.make_parser(__doc__, "allocator")
    parser.add_argument(
        "--only", help="models to replay, by comma; others stay as they are", default=""
    )
    given = parser.parse_args()
    configs, results = Path(os.environ["QLORA_KIT_DATA"]) / "configs", []
    kept = given.results / f"{given.result}.json"
    for model, targets, rank, points in SETTINGS:
        if given.only and model not in given.only.split(","):
            settings = json.loads(kept.read_text())["settings"]
            results += [one for one in settings if one["model"] == model]
            continue
        base = BaseConfig(str(configs / f"{model}.json"), bits=4)
        lora = LoRAConfig(r=rank, target_modules=targets)
        runs = Runs(base, lora)
        for point in points:
            found = {"model": model, "targets": targets, "rank": rank, **simulated(runs, *point)}
            results.append(found)
            least = found["room_bytes"] - found["reserved_expandable"]
            print(
                f"{model} {targets} r {rank}, {point[1]} x {point[2]} on {point[0]}: "
                f"{found['levels']}; {least / 2**20:.0f} MiB left with expandable segments, "
                f"{(found['room_bytes'] - found['reserved_segments']) / 2**20:.0f} without",
                flush=True,
            )
    print(record.write_result(given, {"settings": results}))


if __name__ == "__main__":
    main()

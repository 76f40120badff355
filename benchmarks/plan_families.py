"""Planned against counted bytes of a run on the CPU, for every family with a record.

    OMP_NUM_THREADS=1 python benchmarks/plan_families.py
    OMP_NUM_THREADS=1 python benchmarks/plan_families.py --names gemma4 "mistral3 (multimodal)"

Of each family a tiny random checkpoint is made (`tests/support`), loaded and stepped in 4, 8 and 16
bits at every recompute level, one row, adapters on all linears: each component of the step and the
peak of each phase, loading included, is counted as a run counts them (memory/profiler.py), and
planned. Writes results/plan_families.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ["HF_HUB_OFFLINE"] = "1"

import record  # noqa: E402
import torch  # noqa: E402
from any_model import save_random  # noqa: E402
from families import TRAITS, save_checkpoint  # noqa: E402
from hybrids import HYBRIDS, save_hybrid  # noqa: E402
from plan_grid import LEVELS, counted_step, run_step, window  # noqa: E402
from wrappers import FIRST, save_wrapped  # noqa: E402

from qlora_kit.base.architecture import ARCHITECTURES  # noqa: E402
from qlora_kit.base.load import read_weights  # noqa: E402
from qlora_kit.base.open import open_base  # noqa: E402
from qlora_kit.config.base import BaseConfig  # noqa: E402
from qlora_kit.config.lora import LoRAConfig  # noqa: E402
from qlora_kit.config.training import TrainingConfig  # noqa: E402
from qlora_kit.errors import QloraKitError, error_line  # noqa: E402
from qlora_kit.kernels.workspace import own_workspace  # noqa: E402
from qlora_kit.lora.inject import inject_lora  # noqa: E402
from qlora_kit.memory.counter import COMPONENTS  # noqa: E402
from qlora_kit.memory.profiler import MemoryProfiler  # noqa: E402
from qlora_kit.plan.memory_plan import BatchShape  # noqa: E402
from qlora_kit.plan.plan import Planner  # noqa: E402
from qlora_kit.training.layer_forward import set_recompute  # noqa: E402
from qlora_kit.training.optimizer import make_optimizer  # noqa: E402
from qlora_kit.training.prepare import prepare_model  # noqa: E402

BITS, LENGTH = (4, 8, 16), 32
Save = Callable[[Path], Any]


def checkpoints() -> dict[str, Save]:
    """What writes a checkpoint of each family into a directory, by the name of the family."""
    made: dict[str, Save] = {}
    for name in TRAITS:
        made[name] = lambda where, name=name: save_checkpoint(where, name, torch.bfloat16)
    for name in HYBRIDS:
        made[f"{name} (hybrid)"] = lambda where, name=name: save_hybrid(where, name, torch.bfloat16)
    for name in FIRST:
        made[f"{name} (multimodal)"] = lambda where, name=name: save_wrapped(where, name)
    here = {traits["model_type"] for traits in TRAITS.values()} | HYBRIDS.keys()
    for name in sorted(ARCHITECTURES.keys() - here):
        made[name] = lambda where, name=name: save_random(where, name)
    return made


def points_of(name: str) -> list[dict[str, Any]]:
    """All bits and levels of one family, in a process that may do others before and after."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints()[name](Path(scratch))
        found = []
        for bits in BITS:
            try:
                found += _points(scratch, bits)
            except QloraKitError as error:
                found.append({"bits": bits, "refused": error_line(error).replace(scratch, name)})
    return [{"family": name, **point} for point in found]


def _points(directory: str, bits: int) -> list[dict[str, Any]]:
    """All levels of one checkpoint, loaded once."""
    base = BaseConfig(directory, bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=8, target_modules="all-linear")
    training = TrainingConfig(optim="adamw")
    planner, points = Planner(base, lora, training), []
    with own_workspace({}):
        opened = open_base(base)
        profiler = MemoryProfiler(opened.device)
        with profiler.loading() as counter:
            counter.at("load")
            model = read_weights(opened, counter.tag)
            counter.at("inject")
            inject_lora(model, lora, seed=training.seed)
        loading = {phase: one.peak for phase, one in profiler.phases.items()}
        prepare_model(model, training, "none")
        optimizer = make_optimizer(training.optim, model.parameters(), 1e-4)
        model.train()
        batches = window(1, LENGTH, micro_steps=1)
        run_step(model, optimizer, batches)  # makes the states, and the workspace
        for level in LEVELS:
            set_recompute(model, level)
            counted = loading | counted_step(model, optimizer, batches)
            plan = planner.plan(BatchShape(1, LENGTH, LENGTH), level, micro_steps=1)
            planned = {**{name: plan.bytes[name] for name in COMPONENTS}, **plan.phases}
            counted["peak"] = max(counted[phase] for phase in plan.phases)
            planned["peak"] = plan.peak_bytes
            apart = {
                one: planned[one] - counted[one] for one in counted if planned[one] != counted[one]
            }
            points.append({"bits": bits, "level": level, "counted": counted, "apart": apart})
    return points


def main() -> None:
    """Count, plan, compare and write."""
    parser = record.make_parser(__doc__, "plan_families")
    parser.add_argument("--names", nargs="+", help="some families alone")
    parser.add_argument("--processes", type=int, default=2)
    asked: argparse.Namespace = parser.parse_args()
    # Those with a record of their blocks first: the others' recurrences are slow.
    here = {name: number for number, name in enumerate(checkpoints())}
    names = asked.names or sorted(here, key=here.__getitem__)
    points: list[dict[str, Any]] = []
    left = list(names)
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        for found in pool.imap_unordered(points_of, names):
            left.remove(found[0]["family"])
            points += found
            for point in found:
                said = point.get("refused") or point["apart"] or "equal"
                print(point["family"], point["bits"], point.get("level", ""), said, flush=True)
            path = _write(asked, points, left)
    print(path)


def _write(asked: argparse.Namespace, points: list[dict[str, Any]], left: list[str]) -> Path:
    """Write what is there so far, so that a sweep that is ended says what it had."""
    compared = [point for point in points if "apart" in point]
    result = {
        "families": len({point["family"] for point in compared}),
        "points": len(compared),
        "largest_difference_bytes": max(
            (abs(one) for point in compared for one in point["apart"].values()), default=0
        ),
        "not_tried": sorted(left),
        "table": points,
    }
    return record.write_result(asked, result)


if __name__ == "__main__":
    main()

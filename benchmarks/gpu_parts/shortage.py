"""A card that is too small: the levels that `auto` takes, a run that has less than it was planned
for, halved batches, export under a cap.

A process of its own, whose share of the card is capped. What `mem_get_info` says is not changed by
that, so the plan is given the cap as its budget.
"""

from __future__ import annotations

import gc
import json
from typing import Any

import torch
from random_checkpoint import copy_tokenizer, make_checkpoint
from stepping import TINY

from gpu_parts.child import in_child
from gpu_parts.commands import PLAIN, run_command
from gpu_parts.setting import Setting, lora_options, training_options
from gpu_parts.shapes import BIG, LITTLE, Point, write_shape
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import QloraKitError
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.training.guard import Guard
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train_step
from qlora_kit.training.preflight import preflight

CAP = 12_000_000_000
EXPORT_CAP = 60_000_000
LEAST = 2**20
"""Of --memory_budget."""
LENGTH, ROWS = 2048, 4
ALARM = 90


def run(setting: Setting, found: dict[str, Any]) -> str:
    """In a process that ends with its cap."""
    setting.forget()
    return in_child(setting, found, "shortage", ALARM, {})


def child(setting: Setting, found: dict[str, Any]) -> str:
    """Each in turn; what one of them raises is its result."""
    asked = {"auto": _auto, "halving": _halving, "replanned": _replanned, "export": _export}
    for name, one in asked.items():
        found[name] = result = {}
        try:
            one(setting, result)
        except (QloraKitError, RuntimeError, MemoryError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
    return "; ".join(
        f"{name}: {one.get('error') or one.get('said', 'well')}"[:160]
        for name, one in found.items()
    )


def _cap(setting: Setting, size: int) -> None:
    """Let the allocator have so many bytes."""
    if setting.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))


def _auto(setting: Setting, found: dict[str, Any]) -> None:
    """Plan within the cap as a run does, try the batch as a run does, then step."""
    path = write_shape(BIG, setting.small, setting.scratch)
    config = BaseConfig(str(path), bits=4, dtype="bf16", device=setting.device.type)
    planner = Planner(config, lora_options(), training_options())
    length, cap = setting.short(LENGTH), CAP
    shape = BatchShape(1, length, length - 1)
    if setting.small:
        cap = sum(planner.plan(shape, level).peak_bytes for level in ("none", "full")) // 2
    plan = planner.plan(shape, "auto", cap)
    found |= {"budget_bytes": cap, "planned_bytes": plan.peak_bytes, "levels": plan.recompute}
    model = setting.model(BIG)
    set_recompute(model.model, plan.levels)
    overhead = planner.overhead.fixed
    _cap(setting, cap - overhead)
    notes: list[str] = []
    found["notes"] = notes
    guard = Guard(model.model, note=notes.append)
    (batch,) = setting.batches(Point(BIG, LENGTH, "auto"), model.model)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    preflight(model.model, model.optimizer, batch, guard, accumulates=False)
    for step in (1, 2):
        train_step(
            model.model,
            [batch],
            model.optimizer,
            step=step,
            max_grad_norm=1.0,
            run_backward=guard.run_backward,
        )
    setting.wait()
    if setting.cuda:
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    found["said"] = plan.recompute


def _halving(setting: Setting, found: dict[str, Any]) -> None:
    """Four rows where two fit: halved, the same step, nothing left behind."""
    if not setting.cuda:
        found["said"] = "needs a card"
        return
    model = setting.model(BIG)
    set_recompute(model.model, "full")
    four, two = Point(BIG, LENGTH, "full", rows=ROWS), Point(BIG, LENGTH, "full", rows=ROWS // 2)
    peaks = {}
    for point in (four, two):
        peaks[point.rows] = setting.measured(model, point)["reserved_bytes"]
    found["reserved_bytes"] = peaks
    batches = setting.batches(four, model.model)
    notes: list[str] = []
    found["notes"] = notes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _cap(setting, (peaks[ROWS] + peaks[ROWS // 2]) // 2)
    guard = Guard(model.model, note=notes.append)
    train_step(
        model.model,
        batches,
        model.optimizer,
        step=1,
        max_grad_norm=1.0,
        run_backward=guard.run_backward,
    )
    setting.wait()
    gc.collect()
    found["left_behind_bytes"] = torch.cuda.memory_allocated() - before
    found["max_rows"] = guard.max_rows
    found["said"] = f"{guard.max_rows} rows at a time, {found['left_behind_bytes']} bytes left"


def _replanned(setting: Setting, found: dict[str, Any]) -> None:
    """A whole run that is planned with nothing recomputed, where there is no room for that."""
    setting.forget()
    shape = write_shape(LITTLE, setting.small, setting.scratch)
    base, length = setting.scratch / "little", setting.short(LENGTH)
    make_checkpoint(shape, base)
    copy_tokenizer(TINY, base)
    rows = setting.scratch / "long.jsonl"
    words = "The road was long and round. " * length
    rows.write_text("".join(json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(4)))
    config = BaseConfig(str(base), bits=4, dtype="bf16", device=setting.device.type)
    planner = Planner(config, lora_options(), training_options())
    plans = {
        level: planner.plan(BatchShape(1, length, length - 1), level) for level in ("none", "full")
    }
    margin = planner.overhead.margin(plans["none"].peak_bytes)
    budget = max(plans["none"].peak_bytes + 2 * margin, LEAST)
    found |= {"budget_bytes": budget, "planned_bytes": {k: p.peak_bytes for k, p in plans.items()}}
    _cap(setting, sum(p.peak_bytes for p in plans.values()) // 2 - planner.overhead.fixed)
    run_command(
        found,
        "finetune",
        "finetune",
        *("--model", base, "--bits", "4", "--dtype", "bf16", "--data", rows),
        *("--max_length", str(length), "--eval_fraction", "0", "--target_modules", "all-linear"),
        *("--optim", "adamw", "--gradient_accumulation_steps", "1", "--max_steps", "3"),
        *("--memory_budget", str(budget), "--output_dir", setting.scratch / "replanned"),
        *("--device", setting.device.type),
    )
    out = found["finetune"]["out"] + found["finetune"]["error"]
    lines = [line for line in out.splitlines() if "out of memory" in line]
    found["said"] = f"exit {found['finetune']['code']}, {lines[-1] if lines else 'never full'}"


def _export(setting: Setting, found: dict[str, Any]) -> None:
    """tiny exported where the card does not hold its 16-bit copy."""
    setting.forget()
    device = ["--device", setting.device.type]
    adapter = setting.scratch / "capped"
    few = ("--output_dir", adapter, "--max_steps", "2", *PLAIN, *device)
    run_command(found, "finetune", "finetune", *few)
    _cap(setting, EXPORT_CAP)
    merged = setting.scratch / "capped-merged"
    run_command(found, "export", "export", "--adapter", adapter, "--output_dir", merged, *device)
    found["said"] = f"export ended with {found['export']['code']}"

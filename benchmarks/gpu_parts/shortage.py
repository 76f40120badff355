"""A card that is too small: the levels that `auto` takes, halved batches, export under a cap.

A process of its own, whose share of the card is capped. What `mem_get_info` says is not changed by
that, so the plan is given the cap as its budget.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from gpu_parts.child import in_child
from gpu_parts.commands import PLAIN, run_command
from gpu_parts.setting import Setting, lora_options, training_options
from gpu_parts.shapes import BIG, Point, write_shape
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import QloraKitError
from qlora_kit.plan.plan import BatchShape, Planner
from qlora_kit.training.guard import Guard
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train_step
from qlora_kit.training.preflight import preflight

CAP, SMALL_CAP = 12_000_000_000, 1_030_000
EXPORT_CAP = 60_000_000
LENGTH, ROWS = 2048, 4
ALARM = 90


def run(setting: Setting, found: dict[str, Any]) -> str:
    """In a process that ends with its cap."""
    setting.forget()
    return in_child(setting, found, "shortage", ALARM, {})


def child(setting: Setting, found: dict[str, Any]) -> str:
    """Each in turn; what one of them raises is its result."""
    asked = {"auto": _auto, "halving": _halving, "export": _export}
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
        f"{name}: {one.get('error') or one.get('said', 'well')}"[:120]
        for name, one in found.items()
    )


def _cap(setting: Setting, size: int) -> None:
    """Let the allocator have so many bytes."""
    if setting.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))


def _auto(setting: Setting, found: dict[str, Any]) -> None:
    """Plan within the cap as a run does, try the batch as a run does, then step."""
    cap = SMALL_CAP if setting.small else CAP
    path = write_shape(BIG, setting.small, setting.scratch)
    config = BaseConfig(str(path), bits=4, dtype="bf16", device=setting.device.type)
    planner = Planner(config, lora_options(), training_options())
    length = setting.short(LENGTH)
    plan = planner.plan(BatchShape(1, length, length), "auto", cap)
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

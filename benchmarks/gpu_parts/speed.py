"""Steps of ours at several shapes, one of them profiled, beside the floor of the products alone.

8 accumulated rows of 256 tokens and 8 rows at once are the same step: what differs is how often the
weights are dequantized.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from step_floor import products_floor
from step_profile import profiled

from gpu_parts.setting import Model, Setting
from gpu_parts.shapes import BIG, SPEED, Point, shape_of
from qlora_kit.training.layer_forward import set_recompute

STEPS = 5
FLOORS = 4


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Every point in turn; then the profile of the first and the floors of 2,048 tokens."""
    model, points = setting.model(BIG), {}
    found["points"] = points
    for point in SPEED:
        points[point.name] = one = timed(setting, model, point)
        if (modelled := _modelled(setting, point)) is not None:
            one["modelled_s"] = modelled
    first = SPEED[0]
    set_recompute(model.model, first.level)
    batches = setting.batches(first, model.model)
    found["profile"] = profiled(lambda: model.step(batches), setting.device.type)
    tokens = sum(first.row_lengths(setting.small))
    floor = products_floor(shape_of(BIG, setting.small), tokens, setting.device.type)
    found["floor_s"] = {
        level: min(floor(level) for _ in range(FLOORS)) for level in ("none", "full")
    }
    one = points[first.name]
    busy = found["profile"].get("busy_share")
    return (
        f"{first.name}: {one['tokens_per_s']:,.0f} tokens/s, "
        f"{found['floor_s']['none'] / one['step_s']:.0%} of it products"
        + (f", the card busy {busy:.0%}" if busy is not None else "")
    )


def timed(setting: Setting, model: Model, point: Point) -> dict[str, float]:
    """Median seconds of a step, its tokens a second."""
    set_recompute(model.model, point.level)
    batches = setting.batches(point, model.model)
    taken = setting.median_s(lambda: model.step(batches), STEPS, warm_up=2)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {"step_s": taken, "tokens_per_s": tokens / taken, "tokens": tokens}


def _modelled(setting: Setting, point: Point) -> float | None:
    """What the step-time model says of the point on this card; None where it says nothing."""
    plan = setting.planned(point)
    if plan is None or importlib.util.find_spec("qlora_kit.plan.step_time") is None:
        return None
    seconds: float | None = plan.get("step_s")
    return seconds

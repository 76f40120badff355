"""Steps of ours at several shapes, one of them profiled, beside the floor of the products alone.

8 accumulated rows of 256 tokens and 8 rows at once are the same step: what differs is how often the
weights are dequantized. Beside each stands what the step-time model says of this card.
"""

from __future__ import annotations

from typing import Any

import torch
from step_floor import products_floor
from step_profile import profiled

from gpu_parts.setting import Model, Setting
from gpu_parts.shapes import BIG, SPEED, Point, shape_of
from qlora_kit.device.cards import card_named
from qlora_kit.training.layer_forward import set_recompute

STEPS = 5
FLOORS = 4


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Every point in turn; then the profile of the first and the floors of 2,048 tokens."""
    model, points = setting.model(BIG), {}
    found["points"] = points
    for point in SPEED:
        points[point.name] = one = timed(setting, model, point)
        if (model_of := modelled(setting, point)) is not None:
            one |= {"modelled": model_of, "model_over": model_of["step_s"] / one["step_s"]}
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
    if "kernels_s" in found["profile"]:
        found["busy_share"] = found["profile"]["kernels_s"] / one["step_s"]
    busy = found.get("busy_share")
    return (
        f"{first.name}: {one['tokens_per_s']:,.0f} tokens/s, "
        f"{found['floor_s']['none'] / one['step_s']:.0%} of it products"
        + (f", the card busy {busy:.0%}" if busy is not None else "")
    )


def timed(setting: Setting, model: Model, point: Point) -> dict[str, Any]:
    """Median seconds of a step, its tokens a second."""
    set_recompute(model.model, point.level)
    batches = setting.batches(point, model.model)
    taken = setting.median_s(lambda: model.step(batches), STEPS, warm_up=2)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {"step_s": taken, "tokens_per_s": tokens / taken, "tokens": tokens}


def modelled(setting: Setting, point: Point) -> dict[str, Any] | None:
    """What the step-time model says of the point on this card; None for a card it does not know."""
    plan = setting.planned(point)
    if plan is None or not setting.cuda:
        return None
    total = torch.cuda.get_device_properties(0).total_memory
    card = card_named(torch.cuda.get_device_name(), total)
    found: dict[str, Any] | None = plan["modelled"].get(card.name) if card else None
    return found

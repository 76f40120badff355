"""Planned against allocated and reserved bytes, and what the driver counts beside the allocator.

4 bits, all linears, r 16, AdamW. The plan's peak of the passes and of the optimizer's step is
compared with what the allocator counts over one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG, MEMORY, Point


def run(setting: Setting, found: dict[str, Any]) -> str:
    """The points of the 8B shape."""
    return measure(setting, found, BIG, MEMORY)


def measure(setting: Setting, found: dict[str, Any], name: str, points: Sequence[Point]) -> str:
    """Every point of one shape in turn."""
    measured: dict[str, Any] = {}
    found["points"] = measured
    model = setting.model(name)
    found["fused"] = model.fused is None
    for point in points:
        measured[point.name] = setting.compared(model, point)
    if setting.cuda:
        # The context, libraries that are loaded lazily, cuBLAS workspaces.
        found["outside_bytes"] = max(one["outside_bytes"] for one in measured.values())
        found["reserved_share"] = max(
            one["reserved_bytes"] / one["allocated_bytes"] - 1 for one in measured.values()
        )
    errors = [abs(one["error"]) for one in measured.values() if "error" in one]
    worst = f"plan off by {max(errors):.1%} at most" if errors else "no plans"
    highest = max(one["allocated_bytes"] for one in measured.values())
    return f"{len(measured)} points, {worst}; the largest step {highest / 1e9:.2f} GB"

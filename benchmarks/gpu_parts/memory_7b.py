"""Planned against allocated and reserved bytes of the 7B shape; as `memory.py`."""

from __future__ import annotations

from typing import Any

from gpu_parts.memory import measure
from gpu_parts.setting import Setting
from gpu_parts.shapes import MEMORY_OLDER, OLDER


def run(setting: Setting, found: dict[str, Any]) -> str:
    """The points of the 7B shape, with no other model on the card."""
    setting.forget()
    line = measure(setting, found, OLDER, MEMORY_OLDER)
    setting.forget()
    return line

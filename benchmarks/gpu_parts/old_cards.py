"""Attention as a card without flash has it, and what is never flash: soft caps, fp32.

The card that is here is taken for a T4, and torch may take its memory-efficient
and its math kernel only. The math kernel makes (heads, T, T) in fp32; it is among the kernels that
ran if a name says softmax. Also long rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from step_profile import profiled
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.setting import Setting
from gpu_parts.shapes import OLD_CARDS
from qlora_kit.device.cards import find_card
from qlora_kit.training.layer_forward import set_recompute

TELLING = ("attention", "fmha", "flash", "softmax", "cutlass")
WITHOUT_FLASH = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Each point with a model of its own dtype: bytes against the plan, and the kernels."""
    for point in OLD_CARDS:
        setting.forget(keep=[point.model])
        found[point.name] = one = {}
        with as_card(setting, point.card):
            model = setting.model(point.model, point.dtype)
            one |= setting.compared(model, point)
            set_recompute(model.model, point.level)
            batches = setting.batches(point, model.model)
            step = profiled(lambda m=model, b=batches: m.step(b), setting.device.type)
        names = step["by_name"]
        one["attention"] = [name for name in names if any(word in name.lower() for word in TELLING)]
    setting.forget()
    errors = [f"{one['error']:+.1%}" for one in found.values() if "error" in one]
    return f"{len(found)} points, plan off by {', '.join(errors) or '(no plans)'}"


@contextlib.contextmanager
def as_card(setting: Setting, card: str | None) -> Iterator[None]:
    """Inside, the card has the capability of that one for whoever asks, and no flash."""
    if card is None or not setting.cuda:
        yield
        return
    real = torch.cuda.get_device_capability
    capability = find_card(card).capability
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        with sdpa_kernel(WITHOUT_FLASH):
            yield
    finally:
        torch.cuda.get_device_capability = real

"""Steps at lengths that are new: cuDNN's attention builds a plan for each, flash does not.

A process of its own, without the variable that turns cuDNN's attention off (TORCH_CUDNN_SDPA_
DEPRIORITIZED): first as the package leaves it, then with cuDNN's preferred, eight lengths each.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from gpu_parts.child import in_child
from gpu_parts.setting import Setting
from gpu_parts.shapes import LITTLE, Point
from qlora_kit.training.layer_forward import set_recompute

VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
COUNT, FIRST, STEP = 8, 512, 32
ALARM = 50


def run(setting: Setting, found: dict[str, Any]) -> str:
    """In a process without the variable."""
    setting.forget()
    return in_child(setting, found, "lengths", ALARM, {VARIABLE: None})


def child(setting: Setting, found: dict[str, Any]) -> str:
    """Seconds of the first step at each length, and of the second."""
    model = setting.model(LITTLE)
    set_recompute(model.model, "none")
    found["cudnn as left"] = torch.backends.cuda.cudnn_sdp_enabled()
    _step(setting, model, FIRST - STEP)  # makes what any step needs
    for number, (name, preferred) in enumerate({"as left": None, "cudnn": True}.items()):
        if preferred is not None:
            torch.backends.cuda.enable_cudnn_sdp(True)
            torch.backends.cuda.enable_flash_sdp(False)
        # Lengths of the one are new to the other as well.
        lengths = [FIRST + STEP * i + STEP // 2 * number for i in range(COUNT)]
        seconds = [[_step(setting, model, length) for length in lengths] for _ in range(2)]
        first, second = (statistics.median(one) for one in seconds)
        found[name] = {"lengths": lengths, "first_s": seconds[0], "second_s": seconds[1]}
        found[name]["extra_s"] = first - second
    return ", ".join(
        f"{name}: {found[name]['extra_s'] * 1e3:+.1f} ms at a new length"
        for name in ("as left", "cudnn")
    )


def _step(setting: Setting, model: Any, length: int) -> float:
    batches = setting.batches(Point(LITTLE, length, "none"), model.model)
    return setting.seconds(lambda: model.step(batches), 1, warm_up=0)[0]

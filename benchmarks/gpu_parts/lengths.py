"""Steps at lengths that are new, and torch's attention at them: cuDNN's builds a plan for each.

A process of its own, without the variable that turns cuDNN's attention off (TORCH_CUDNN_SDPA_
DEPRIORITIZED): a step at eight lengths, then a second one at each, as the package leaves the
choice; then attention alone, forward and backward, by flash and by cuDNN.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.child import in_child
from gpu_parts.setting import Setting
from gpu_parts.shapes import LITTLE, Point
from qlora_kit.training.layer_forward import set_recompute

VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
COUNT, FIRST, STEP = 8, 512, 32
HEADS, SIZE = 8, 64
ALARM = 50


def run(setting: Setting, found: dict[str, Any]) -> str:
    """In a process without the variable."""
    setting.forget()
    return in_child(setting, found, "lengths", ALARM, {VARIABLE: None})


def child(setting: Setting, found: dict[str, Any]) -> str:
    """Seconds at each length the first time, and the second; what the first takes more."""
    lengths = [FIRST + STEP * number for number in range(COUNT)]
    model = setting.model(LITTLE)
    set_recompute(model.model, "none")
    found["cudnn left on"] = torch.backends.cuda.cudnn_sdp_enabled()

    def step(length: int) -> None:
        model.step(setting.batches(Point(LITTLE, length, "none"), model.model))

    step(FIRST - STEP)  # makes what any step needs
    found["steps"] = _twice(setting, lengths, step)
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, kernel in kernels.items():
        with sdpa_kernel(kernel if setting.cuda else SDPBackend.MATH):
            _attend(setting, FIRST - STEP)
            found[name] = _twice(setting, lengths, lambda length: _attend(setting, length))
    return ", ".join(
        f"{name}: {found[name]['extra_s'] * 1e3:+.1f} ms at a new length"
        for name in ("steps", *kernels)
    )


def _twice(setting: Setting, lengths: Sequence[int], call: Callable[[int], None]) -> dict[str, Any]:
    first, second = (
        [setting.seconds(lambda n=length: call(n), 1, warm_up=0)[0] for length in lengths]
        for _ in range(2)
    )
    extra = statistics.median(first) - statistics.median(second)
    return {"lengths": lengths, "first_s": first, "second_s": second, "extra_s": extra}


def _attend(setting: Setting, length: int) -> None:
    """Causal attention of one sequence and its gradients."""
    shape = (1, HEADS, setting.short(length), SIZE)
    query, key, value = (
        torch.randn(shape, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

"""Kernels of ours against their torch twins and bitsandbytes: seconds, and bytes a second."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG, shape_of
from qlora_kit.base.linear import Linear4bit, quantize_linear
from qlora_kit.base.quantize import Quantization

TIMES = 20


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Decoding of the largest linear."""
    config = shape_of(BIG, setting.small)
    shape = config["intermediate_size"], config["hidden_size"]
    dtype = torch.bfloat16
    weight = torch.randn(shape, device=setting.device, dtype=dtype)
    layer = quantize_linear(weight, None, Quantization(4, "nf4", True))
    assert isinstance(layer, Linear4bit)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    moved = weight.numel() * (0.5 + 1 / 64 + 2)
    calls = {
        "ours": lambda: layer.dequantize(dtype),
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
    }
    for name, call in calls.items():
        seconds = setting.median_s(call, TIMES, warm_up=3)
        found[f"decoding, {name}"] = {"seconds": seconds, "bytes_per_s": moved / seconds}
    return ", ".join(f"{name} {one['bytes_per_s'] / 1e9:.0f} GB/s" for name, one in found.items())

"""The 8B shape onto the device through the package's own loading, and where its time goes."""

from __future__ import annotations

import time
from typing import Any

import torch
from random_checkpoint import Noise
from torch import Tensor, nn

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG
from qlora_kit.base.linear import QuantizedLinear, quantize_linear
from qlora_kit.base.load import fill
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.safetensors_file import TensorEntry


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Load once, each part of it timed with a wait before and after."""
    base, noise, spent = setting.base(BIG), Noise(), {"read_s": 0.0, "encode_s": 0.0}

    def read(entry: TensorEntry, into: Tensor) -> None:
        began = time.perf_counter()
        noise(entry, into)
        spent["read_s"] += time.perf_counter() - began

    def quantize(
        weight: Tensor, bias: Tensor | None, how: Quantization, *, name: str = "weight"
    ) -> QuantizedLinear:
        setting.wait()
        began = time.perf_counter()
        layer = quantize_linear(weight, bias, how, name=name)
        setting.wait()
        spent["encode_s"] += time.perf_counter() - began
        return layer

    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = fill(base, read, quantize=quantize)
    setting.wait()
    taken = time.perf_counter() - began
    found |= {"seconds": taken, **spent}
    found["check_and_copy_s"] = taken - sum(spent.values())
    found["held_bytes"] = _held(model)
    if setting.cuda:
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["allocated_bytes"] = torch.cuda.memory_allocated()
        found["reserved_bytes"] = torch.cuda.memory_reserved()
        found["beside_bytes"] = found["reserved_bytes"] - found["allocated_bytes"]
    setting.models[BIG, "bf16"] = setting.adapted(model)
    return (
        f"{found['held_bytes'] / 1e9:.2f} GB in {taken:.1f} s: {spent['read_s']:.1f} filled, "
        f"{found['check_and_copy_s']:.1f} checked and copied, {spent['encode_s']:.1f} encoded"
    )


def _held(model: nn.Module) -> int:
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())

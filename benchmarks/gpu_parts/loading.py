"""The 8B shape onto the device through the package's own loading, and where its time goes."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from random_checkpoint import Noise
from torch import Tensor, nn

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG
from qlora_kit.base.fill import fill
from qlora_kit.base.linear import QuantizedLinear, quantize_linear
from qlora_kit.base.safetensors_file import TensorEntry


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Load once with waits around each part, then once as a run does; that model stays."""
    found["apart"] = apart = _apart(setting)
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    base, began = setting.base(BIG), time.perf_counter()
    model = fill(base, Noise())
    setting.wait()
    found["seconds"] = time.perf_counter() - began
    found["held_bytes"] = _held(model)
    if setting.cuda:
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["allocated_bytes"] = torch.cuda.memory_allocated()
        found["reserved_bytes"] = torch.cuda.memory_reserved()
        found["beside_bytes"] = found["reserved_bytes"] - found["allocated_bytes"]
    setting.models[BIG, "bf16"] = setting.adapted(model)
    return (
        f"{found['held_bytes'] / 1e9:.2f} GB in {found['seconds']:.1f} s; one after another "
        f"{apart['read_s']:.1f} filled, {apart['copy_s']:.1f} copied and checked, "
        f"{apart['encode_s']:.1f} encoded"
    )


def _apart(setting: Setting) -> dict[str, float]:
    """Seconds of loading by part, with the device waited for in between."""
    noise, spent = Noise(), {"read_s": 0.0, "encode_s": 0.0}

    def read(entry: TensorEntry, into: Tensor) -> None:
        setting.wait()
        began = time.perf_counter()
        noise(entry, into)
        spent["read_s"] += time.perf_counter() - began

    def quantize(*given: Any, **options: Any) -> QuantizedLinear:
        setting.wait()
        began = time.perf_counter()
        layer = quantize_linear(*given, **options)
        setting.wait()
        spent["encode_s"] += time.perf_counter() - began
        return layer

    base, began = setting.base(BIG), time.perf_counter()
    fill(base, read, quantize=quantize)
    setting.wait()
    taken = time.perf_counter() - began
    return {**spent, "copy_s": taken - sum(spent.values()), "seconds": taken}


def _held(model: nn.Module) -> int:
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())

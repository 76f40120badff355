"""Decoding: greedy tokens a second of the 8B shape, and one linear at few rows and at many."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG
from qlora_kit.base.linear import Linear4bit, base_matmul
from qlora_kit.generation.decode import generate_ids

TOKENS, SMALL_TOKENS, PROMPT = 64, 8, 32
ROWS = (1, 8)
LINEAR_ROWS = (1, 4, 64)
TIMES = 20


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Greedy tokens of prompts of 32, then the linears."""
    model = setting.model(BIG).model
    tokens = SMALL_TOKENS if setting.small else TOKENS
    generator = torch.Generator().manual_seed(0)
    for rows in ROWS:
        prompts = torch.randint(3, model.config.vocab_size, (rows, PROMPT), generator=generator)
        seconds = _decode(setting, model, prompts.tolist(), 4)  # warms up
        seconds = _decode(setting, model, prompts.tolist(), tokens)
        found[f"{rows} rows"] = {"seconds": seconds, "tokens_per_s": rows * tokens / seconds}
    layer = next(one for one in model.modules() if isinstance(one, Linear4bit))
    found["linear"] = {
        "shape": [layer.out_features, layer.in_features],
        **{f"{rows} rows": _linear(setting, layer, rows) for rows in LINEAR_ROWS},
    }
    return ", ".join(
        f"{rows} rows {found[f'{rows} rows']['tokens_per_s']:.1f} tokens/s" for rows in ROWS
    )


def _decode(setting: Setting, model: Any, prompts: list[list[int]], tokens: int) -> float:
    setting.wait()
    began = time.perf_counter()
    made = sum(1 for _ in generate_ids(model, prompts, max_new_tokens=tokens, eos_ids=(), pad_id=0))
    setting.wait()
    assert made == tokens
    return time.perf_counter() - began


def _linear(setting: Setting, layer: Linear4bit, rows: int) -> dict[str, Any]:
    """Seconds of one product: ours, decoded first, and bitsandbytes' fused one; how far apart."""
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    x = torch.randn(rows, layer.in_features, device=setting.device, dtype=dtype)
    calls = {
        "ours": lambda: base_matmul(layer, x),
        "decoded": lambda: F.linear(x, layer.dequantize(dtype), layer.bias),
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        calls["gemm_4bit"] = lambda: _fused(layer, x)
    with torch.no_grad():
        found: dict[str, Any] = {
            f"{name}_s": setting.median_s(call, TIMES, warm_up=3) for name, call in calls.items()
        }
        exact = calls["decoded"]().double()
        for name in calls.keys() - {"decoded"}:
            found[f"{name}_error"] = float((calls[name]().double() - exact).norm() / exact.norm())
    return found


def _fused(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    nested = layer.nested_absmax is not None
    return torch.ops.bitsandbytes.gemm_4bit.default(  # type: ignore[no-any-return]
        x,
        layer.weight.view(-1, 1),
        (layer.out_features, layer.in_features),
        layer.nested_absmax if nested else layer.absmax,
        64,
        layer.quant_type,
        layer.bias,
        layer.absmax if nested else None,
        layer.nested_map,
        layer.nested_offset,
    )

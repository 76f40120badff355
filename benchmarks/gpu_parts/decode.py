"""Decoding: greedy tokens a second of the 8B shape, and one linear at few rows and at many."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG
from qlora_kit.base.linear import Linear4bit, base_matmul
from qlora_kit.base.quantize import decoding, is_fused
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
    """Seconds of one product as in decoding, and by the decoded weight; how far they are apart."""
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    x = torch.randn(rows, layer.in_features, device=setting.device, dtype=dtype)
    with torch.no_grad():
        decoded = setting.median_s(lambda: base_matmul(layer, x), TIMES, warm_up=3)
        exact = base_matmul(layer, x).double()
        with decoding():
            fused = setting.median_s(lambda: base_matmul(layer, x), TIMES, warm_up=3)
            error = float((base_matmul(layer, x).double() - exact).norm() / exact.norm())
            packed = is_fused(x, layer.in_features)
    return {"decoded_s": decoded, "decoding_s": fused, "error": error, "packed": packed}

"""Triton kernels against torch's operations for the same, and bitsandbytes: right, and fast.

Numbers are compared by the law of the tests (`tests/support/kernel_parity.py`), on a card alone.
Seconds are those of a layer of the 8B shape and 2,048 tokens, with the bytes a second that are read
and written at least; then a whole step of the 1B shape with the kernels and without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from step_profile import profiled

from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG, LITTLE, Point, shape_of
from qlora_kit.base.linear import Linear4bit, quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.rotary import rotate_both
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.kernels.triton_ops import allow_triton
from qlora_kit.training.layer_forward import set_recompute

TESTS = Path(__file__).resolve().parents[2] / "tests" / "support"
TOKENS, TIMES, STEPS = 2048, 20, 4
DTYPE = torch.bfloat16
WAYS = {"ours": True, "torch": False}


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Parity, then seconds of each kernel, then a step."""
    setting.forget()
    wrong = _parity(setting, found)
    try:
        for name, (call, moved) in _calls(setting).items():
            for way, allowed in WAYS.items():
                allow_triton(allowed)
                seconds = setting.median_s(call, TIMES, warm_up=3)
                found[f"{name}, {way}"] = {"seconds": seconds, "bytes_per_s": moved / seconds}
        _bitsandbytes(setting, found)
        found["step"] = {way: _step(setting, allowed) for way, allowed in WAYS.items()}
    finally:
        allow_triton(True)
        setting.forget()
    ours, plain = found["step"]["ours"], found["step"]["torch"]
    rate = found["decoding, ours"]["bytes_per_s"] / 1e9
    return (
        f"{wrong} wrong; decoding {rate:,.0f} GB/s; a step "
        f"{plain['step_s'] / ours['step_s']:.2f} times as fast as without"
    )


def _parity(setting: Setting, found: dict[str, Any]) -> str:
    """How many of the cases are wrong; none is tried off a card."""
    if not setting.cuda:
        return "no card, none"
    sys.path.append(str(TESTS))
    from kernel_parity import parity

    cases = list(parity(setting.device.type))
    bad = [case._asdict() for case in cases if not case.error <= case.limit]
    found["parity"] = {"cases": len(cases), "wrong": bad}
    return f"{len(bad)} of {len(cases)}"


def _calls(setting: Setting) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is timed, and the bytes that it has to move."""
    config, tokens = shape_of(BIG, setting.small), setting.short(TOKENS)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = hidden // heads

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=setting.device, dtype=DTYPE)

    layer = quantize_linear(drawn(ffn, hidden), None, Quantization(4, "nf4", True))
    norm = FrozenNorm(drawn(hidden), config["rms_norm_eps"], False)
    x, y, grad = drawn(1, tokens, hidden), drawn(1, tokens, hidden), drawn(1, tokens, hidden)
    _, kept = norm.apply(x)
    q, k = drawn(1, tokens, heads, size), drawn(1, tokens, kv_heads, size)
    cos, sin = drawn(1, tokens, size), drawn(1, tokens, size)
    gate, up, grad_gated = drawn(1, tokens, ffn), drawn(1, tokens, ffn), drawn(1, tokens, ffn)
    gated = Gate(config["hidden_act"])
    row, wide = 2.0 * x.numel(), 2.0 * gate.numel()
    return {
        "decoding": (lambda: layer.dequantize(DTYPE), _decoded_bytes(layer)),
        "norm": (lambda: norm.apply(x), 2 * row),
        "sum and norm": (lambda: norm.apply_sum(x, y), 4 * row),
        "norm backward": (lambda: norm.backward(grad, x, kept=kept, residual=y), 4 * row),
        "rotary": (lambda: rotate_both(q, k, cos, sin), 4.0 * (q.numel() + k.numel())),
        "gate": (lambda: gated.apply(gate, up), 3 * wide),
        "gate backward": (lambda: gated.backward(grad_gated, gate, up, kept=None), 5 * wide),
    }


def _decoded_bytes(layer: Any) -> float:
    return layer.in_features * layer.out_features * (0.5 + 1 / 64 + 2.0)


def _bitsandbytes(setting: Setting, found: dict[str, Any]) -> None:
    """The same decoding by bitsandbytes' own way."""
    config = shape_of(BIG, setting.small)
    shape = config["intermediate_size"], config["hidden_size"]
    weight = torch.randn(shape, device=setting.device, dtype=DTYPE)
    layer = quantize_linear(weight, None, Quantization(4, "nf4", True))
    assert isinstance(layer, Linear4bit)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    seconds = setting.median_s(lambda: bnb.dequantize_4bit(packed, state), TIMES, warm_up=3)
    found["decoding, bitsandbytes"] = {
        "seconds": seconds,
        "bytes_per_s": _decoded_bytes(layer) / seconds,
        "equal": bool(torch.equal(bnb.dequantize_4bit(packed, state), layer.dequantize(DTYPE))),
    }


def _step(setting: Setting, allowed: bool) -> dict[str, Any]:
    """Seconds of a step of the 1B shape, and what is launched in it."""
    model = setting.model(LITTLE)
    allow_triton(allowed)
    set_recompute(model.model, "none")
    batches = setting.batches(Point(LITTLE, TOKENS, "none"), model.model)
    seconds = setting.median_s(lambda: model.step(batches), STEPS, warm_up=2)
    profile = profiled(lambda: model.step(batches), setting.device.type)
    return {"step_s": seconds, "loss": float(model.step(batches)), "profile": profile}

"""PEFT on the same shape, as its guide says and at its best: seconds and bytes of a step.

The model is built in this process, its linears as bitsandbytes' own from the same tile of noise;
what PEFT makes of it and how it steps is `peers/`.
"""

from __future__ import annotations

import gc
from typing import Any

import bitsandbytes
import torch
from peers import peft_best, peft_guide, step_dtype
from random_checkpoint import Noise
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_parts.setting import RANK, Setting
from gpu_parts.shapes import BIG, Point, shape_of
from qlora_kit.memory.counter import StorageCounter

SIDES = (
    ("peft_best", peft_best.Peer, "none"),
    ("peft_guide", peft_guide.Peer, "full"),
    ("peft_best", peft_best.Peer, "full"),
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 4


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Each side in turn on a model of its own; one row of 2,048 tokens."""
    setting.forget()
    for name, peer, level in SIDES:
        found[f"{name}, {level}"] = _measured(setting, peer, level)
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()
    return "; ".join(
        f"{name}: {one['tokens_per_s']:,.0f} tokens/s, {one['allocated_bytes'] / 1e9:.2f} GB"
        for name, one in found.items()
    )


def _measured(setting: Setting, kind: Any, level: str) -> dict[str, float]:
    peer = kind(
        None, 4, level, RANK, setting.device.type, targets=LINEARS, model=_quantized(setting)
    )
    (batch,) = setting.batches(Point(BIG, 2048, level), peer.model)
    ids: Tensor = batch["input_ids"]
    if not setting.cuda:
        peer.step(ids)
        with StorageCounter(peer.model) as counter:
            peer.step(ids)
        peak = counter.peak
    else:
        peer.step(ids)
        setting.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peer.step(ids)
        setting.wait()
        peak = torch.cuda.max_memory_allocated()
    taken = setting.median_s(lambda: peer.step(ids), STEPS, warm_up=1)
    return {"step_s": taken, "tokens_per_s": ids.numel() / taken, "allocated_bytes": peak}


def _quantized(setting: Setting) -> Any:
    """transformers' model of the 8B shape with the linears of its layers in NF4, double quant."""
    config = dict(shape_of(BIG, setting.small))
    dtype, noise = step_dtype(setting.device.type), Noise()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), dtype=dtype
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _linear(setting, module, noise, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            filled = noise.fill(torch.empty(parameter.shape, dtype=dtype, device=setting.device))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(filled, requires_grad=False))
    with torch.device(setting.device):  # its tables are in no file
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what PEFT and its guide ask
    return model


def _linear(setting: Setting, like: nn.Linear, noise: Noise, dtype: torch.dtype) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        like.in_features,
        like.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = noise.fill(torch.empty(like.weight.shape, dtype=dtype, device=setting.device))
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(setting.device)
    # bitsandbytes repacks such weights in place on some processors, and they train wrong then.
    made.support_avx512bf16_for_cpu = False
    return made

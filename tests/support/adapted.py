"""Tiny models of every family with random adapters, as training has them."""

from __future__ import annotations

from typing import Any

import torch
from families import tiny_model

from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.attention import set_packed_attention
from qlora_kit.training.layer_forward import use_fused_blocks

RANK = 4
BITS = {4: Quantization(4, "nf4", True), 8: Quantization(8)}


def adapted_model(
    family: str = "llama2",
    dtype: torch.dtype = torch.float32,
    *,
    bits: int = 16,
    own: bool = True,
    packed: bool = False,
    dropout: float = 0.0,
    targets: str = "auto",
    **changes: Any,
) -> Any:
    """A model that trains, its B drawn; `packed` lets it attend within rows, `own` is the block."""
    model = tiny_model(family, dtype, **changes)
    if family != "gemma2":  # sdpa has no soft cap of attention
        model.set_attn_implementation("sdpa")
    if bits < 16:
        quantize(model, bits)
    model.requires_grad_(False)
    inject_lora(model, LoRAConfig(r=RANK, target_modules=targets, dropout=dropout), seed=0)
    drawn = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=drawn)
    if packed:
        set_packed_attention(model)
    if own:
        assert use_fused_blocks(model) is None
    return model.train()


def quantize(model: Any, bits: int) -> Any:
    """The model with all its linears but the head quantized."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            owner, _, leaf = name.rpartition(".")
            bias = None if module.bias is None else module.bias.data
            layer = quantize_linear(module.weight.data, bias, BITS[bits])
            setattr(model.get_submodule(owner), leaf, layer)
    return model

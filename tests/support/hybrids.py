"""Tiny models with convolutions and recurrences, each with what sets its family apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import SIZES, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

MAMBA = {
    "mamba_chunk_size": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    # Three layers of the gated delta rule, then one of attention, as published.
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "granitemoehybrid": {
        **MAMBA,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 173,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.7,
    },
    "bamba": {**MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M-*-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "n_groups": 2,
        "head_dim": 16,
    },
    "falcon_h1": {
        **MAMBA,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 128,
        "mamba_rms_norm": True,
        "key_multiplier": 0.7,
        "lm_head_multiplier": 0.6,
        "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
    },
}


def tiny_hybrid(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' own model of a kind, random but always the same, in evaluation mode."""
    settings = {**SIZES, **HYBRIDS[kind], **changes}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            # A state that lasts some ten tokens; at first transformers' own are gone after one.
            torch.nn.init.normal_(parameter, mean=-1.0, std=0.3)
        elif parameter.dim() > 1:
            spread = 0.3 if "embed" in name else 0.5 if "conv1d" in name else 0.08
            torch.nn.init.normal_(parameter, std=spread)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_hybrid(
    directory: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Write a tiny checkpoint with its tokenizer; returns transformers' model of it."""
    model = tiny_hybrid(kind, dtype, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model

"""Tiny multimodal checkpoints, made by transformers' own multimodal classes, towers and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY, save_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_EYE = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, **EYE}
SIGLIP = {"model_type": "siglip_vision_model", **EYE}
WRAPPERS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral"},
        "vision_config": PIXTRAL,
        "image_token_index": 5,
    },
    "ministral3": {
        "model_type": "mistral3",
        "text_config": {"model_type": "ministral3"},
        "vision_config": PIXTRAL,
        "image_token_index": 5,
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": SIGLIP,
        "image_token_index": 5,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "text_config": {
            "model_type": "gemma4_unified_text",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
        },
        "vision_config": {
            "patch_size": 4,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        },
        "audio_config": {"audio_embed_dim": 16},
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": QWEN_EYE,
    },
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **EYE},
        "image_token_index": 5,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": {"rope_parameters": SECTIONS},
        "vision_config": QWEN_EYE,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {"rope_parameters": SECTIONS},
        "vision_config": {**QWEN_EYE, "deepstack_visual_indexes": [0]},
    },
}


FIRST = ("mistral3", "ministral3", "gemma3", "gemma4", "gemma4_unified", "qwen3_5")
"""The families that are trained, read by others and exported in the tests."""


def save_wrapped(directory: Path, name: str, **text: Any) -> Any:
    """Write a tiny multimodal checkpoint with its tokenizer; returns transformers' model of it."""
    settings = {**WRAPPERS[name], "text_config": {**TEXT, **WRAPPERS[name]["text_config"], **text}}
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    for parameter_name, parameter in model.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else 0.3 if "embed_tokens" in parameter_name else 0.15
        around = 1.0 if "norm" in parameter_name and not name.startswith("gemma") else 0.0
        torch.nn.init.normal_(parameter, mean=around, std=spread)
    model.eval().save_pretrained(directory)
    save_tokenizer(directory)
    return model

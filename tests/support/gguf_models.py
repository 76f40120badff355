"""Settings of tiny models of every family that is written as GGUF."""

from __future__ import annotations

from typing import Any

from families import LONG_ROPE

WIDE = {"intermediate_size": 192}
"""Rows of whole blocks of 32 numbers."""
LONG = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
"""llama.cpp has no context below 256 tokens: of up to these it takes the short factors, and of the
16 that the tiny models have otherwise the long ones, as transformers for a text of 20."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {}),
    "llama3": ("llama3", {}),
    "llama_bias": ("llama_bias", {}),
    "llama_yarn": ("llama2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "num_hidden_layers": 6}),
    "gemma3_untied": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": False,
            "final_logit_softcapping": None,
        },
    ),
    "phi3": ("phi3", {"rope_scaling": LONG_ROPE, **LONG}),
    "phi3_long": ("phi3", {}),
    "phi4_mini": ("phi4_mini", LONG),
    "granite": ("granite", {"attention_bias": True, "rope_parameters": LINEAR}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
}
"""Models of every family that is written, by what is special about each."""

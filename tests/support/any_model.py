"""Tiny random models of any `model_type` that transformers maps to a causal language model.

A family's own configuration is shrunk by the names of its fields and keeps its traits: layer types,
norms, biases, multipliers, ropes, caps. What the names do not say is in `CHANGES`. Weights are
random and larger than a fresh model's, norms and biases included, so that a tensor that goes astray
changes the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY, save_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LAYERS = 2
WIDTH, HEADS, GROUPS, HEAD, INNER = 64, 4, 2, 16, 160
SMALL: dict[str, Any] = {
    # By the name of the field, where a family's configuration has it.
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "intermediate_size": INNER,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "n_positions": 128,
    "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "ffn_dim": INNER,
    "ffn_hidden_size": INNER,
    "block_size": 32,
    "mlp_hidden_size": INNER,
    "rotary_dim": 8,
    "lora_rank_attention": 16,
    # An encoder beside the decoder.
    "encoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": INNER,
    "num_encoder_layers": 1,
    "num_decoder_layers": LAYERS,
    # Low-rank attention.
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 64,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": INNER,
    "expert_ffn_hidden_size": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # State spaces, linear attention.
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 2,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": WIDTH,
    "d_inner": INNER,
    "attention_hidden_size": WIDTH,
    "num_heads": HEADS,
    "attention_window_size": 16,
    "time_step_rank": 8,
    # Per-layer inputs.
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
    "local_attention": 8,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
}

TRAITS: dict[str, float] = {
    # What would do nothing at its default.
    "logits_scaling": 0.7,
    "logit_scale": 0.4,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 24,
    "logits_soft_cap": 3.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CHANGES: dict[str, dict[str, Any]] = {
    "cpmant": {"dim_ff": INNER, "dim_head": HEAD, "prompt_length": 8},
    "ctrl": {"dff": INNER, "n_positions": 128},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "cohere_compass_text": {
        "logit_scale": 0.4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma3n_text": {"intermediate_size": [INNER] * 4},
    "granitemoehybrid": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD, "layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": GROUPS},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "reformer": {"is_decoder": True},
    "smollm3": {"no_rope_layers": [1, 0], "num_hidden_layers": 2},
}
"""What the names of fields do not say, by model_type."""


def tiny_config(kind: str, **changes: Any) -> Any:
    """The configuration of a family, shrunk; `changes` are set last."""
    family = CONFIG_MAPPING[kind]
    settings = {**_shrunk(family, family()), **CHANGES.get(kind, {}), **changes}
    return family(**settings)


def _shrunk(family: Any, default: Any) -> dict[str, Any]:
    """Settings of `family` that make it small, each by the name that it declares."""
    said, alias = default.to_dict(), family.attribute_map
    settings: dict[str, Any] = {}
    for name, value in SMALL.items():
        own = alias.get(name, name)
        if said.get(own) is not None and type(said[own]) is not bool:
            settings[own] = value
    if "qk_rope_head_dim" in said:  # low-rank attention: a key and a value for every query
        settings.pop("head_dim", None)
        if alias.get("num_key_value_heads", "num_key_value_heads") in settings:
            settings["num_key_value_heads"] = HEADS
    if "expand" in said or "ssm_cfg" in said:  # what is expanded follows from it
        settings.pop("intermediate_size", None)
    for name, value in said.items():
        if type(value) is bool or value is None:
            continue
        if name in TRAITS or (type(value) is float and "multiplier" in name):
            settings[name] = TRAITS.get(name, 0.7 * (value or 1.0))
    layers = alias.get("num_hidden_layers", "num_hidden_layers")
    for name, value in _layer_lists(said, said.get(layers)).items():
        settings[name] = value
        settings[layers] = len(value)
    for name in getattr(family, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            settings[name] = _shrunk(type(part), part)
            if "model_type" in part.to_dict():
                settings[name]["model_type"] = part.model_type
    return settings


def _layer_lists(said: Mapping[str, Any], layers: Any) -> dict[str, list[Any]]:
    """The lists with an entry for each layer, cut to one layer of each kind, two at the least."""
    lists = {
        name: value
        for name, value in said.items()
        if isinstance(value, list) and len(value) == layers and layers > 1
    }
    kinds: dict[tuple[Any, ...], int] = {}
    for number, kind in enumerate(zip(*map(map_text, lists.values()), strict=True)):
        kinds.setdefault(kind, number)
    chosen = sorted(kinds.values())
    chosen = [*chosen, *chosen] if len(chosen) == 1 else chosen
    return {name: [value[number] for number in chosen] for name, value in lists.items()}


def map_text(values: list[Any]) -> list[str]:
    """Entries that may be lists, comparable."""
    return [repr(value) for value in values]


def random_model(kind: str, **changes: Any) -> Any:
    """transformers' own model of a family, random but always the same, in evaluation mode."""
    torch.manual_seed(7)
    config = tiny_config(kind, **changes)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() < 2:
            # Around what a fresh model has: 1 for most norms, a range for recurrent parameters.
            parameter.data += 0.1 * noise
        else:
            parameter.data = noise * (0.3 if "embed" in name else 0.1)
    return model.float().eval()


def save_random(directory: Path, kind: str, **changes: Any) -> Any:
    """Write a tiny checkpoint of a family with its tokenizer; returns transformers' model of it."""
    model = random_model(kind, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model

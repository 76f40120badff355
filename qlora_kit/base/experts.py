"""Whether a config.json has experts built, and how many bytes they are.

What a config counts is not always built: a field may be of another kind of the same family, or say
that no layer has them. Then the model is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_kit.base.field import LARGEST

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
DENSE_UNLESS_SAID = ("doge",)
"""Families that count experts by default and build them where `is_moe` says so."""
WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a layer has the experts that a config counts; where it lists no kinds, all may."""
    if all(count_of(config, key) <= 1 for key in COUNTS):
        return False
    if not config.get("is_moe", config.get("model_type") not in DENSE_UNLESS_SAID):
        return False
    mlps = config.get("mlp_layer_types")
    if isinstance(mlps, list) and mlps and all(kind == "dense" for kind in mlps):
        return False
    layers, dense = count_of(config, "num_hidden_layers"), config.get("mlp_only_layers")
    if layers and count_of(config, "first_k_dense_replace") >= layers:
        return False
    if layers and isinstance(dense, list) and all(one in dense for one in range(layers)):
        return False
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if isinstance(kinds, str):
        return "E" in kinds
    return not isinstance(kinds, list) or "moe" in kinds


def expert_bytes(config: Mapping[str, Any]) -> int:
    """Bytes in 16 bits of all experts, each a gated MLP of three matrices."""
    experts = max(count_of(config, key) for key in COUNTS)
    inner = next((size for key in WIDTHS if (size := count_of(config, key))), 0)
    layers = count_of(config, "num_hidden_layers") or count_of(config, "num_layers")
    layers -= count_of(config, "first_k_dense_replace")
    layers //= max(1, count_of(config, "decoder_sparse_step"))
    return 2 * 3 * layers * experts * count_of(config, "hidden_size") * inner


def count_of(config: Mapping[str, Any], key: str) -> int:
    """A field that is a count, bounded; 0 where it is none."""
    value = config.get(key)
    return min(value, LARGEST) if isinstance(value, int) and value > 0 else 0

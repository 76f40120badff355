"""Which model families are supported, and why another one is not: told from config.json alone.

A family is a `model_type` of transformers whose decoder consists of ordinary linear layers. What
is refused is refused by name, with the bytes that would stay in 16 bits where that is the reason:
a base that is called quantized and mostly is not would be a lie about memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

FAMILIES = {
    # How attention is computed: torch's fused product has no soft cap of the scores.
    "llama": "sdpa",
    "mistral": "sdpa",
    "qwen2": "sdpa",
    "qwen3": "sdpa",
    "gemma2": "eager",
    "phi3": "sdpa",
    "granite": "sdpa",
}
CONV1D = ("gpt2", "openai-gpt")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOWERS = ("vision_config", "vision_tower", "audio_config", "vision_model", "mm_vision_tower")

# Far above every known model. What is larger would take minutes to build before it is refused.
LARGEST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**13,
    "partial_rotary_factor": 1,
}
LARGEST_NUMBER = 10**15
COUNTS = {*LARGEST, "max_position_embeddings", "vocab_size"} - {"partial_rotary_factor"}
"""Numbers of a config of which there is at least one."""


def check_family(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a `config` (from `path`) of a model that cannot be quantized and trained whole.

    Errors: `ModelError`.
    """
    kind = config.get("model_type")
    towers = [key for key in TOWERS if config.get(key)]
    if towers:
        raise ModelError(
            f"{path}: model_type {kind!r} has a tower for other input than text ({towers[0]}), "
            "whose layers would be quantized and adapted as if they were the language model's",
            "give the language model alone, as a checkpoint of its own",
        )
    if any(_whole(config, key) > 1 for key in EXPERT_COUNTS):
        raise ModelError(
            f"{path}: model_type {kind!r} is a mixture of experts: its experts are fused tensors, "
            f"not linear layers, so that {_size(_expert_bytes(config))} would stay unquantized",
            "use a dense model",
        )
    if kind in CONV1D:
        raise ModelError(
            f"{path}: model_type {kind!r} keeps its layers as Conv1D, not as linear layers, so "
            f"that {_size(_conv1d_bytes(config))} would stay unquantized",
            f"use a model of another family ({', '.join(FAMILIES)})",
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{path}: model_type {kind!r} is not supported",
            f"supported families are {', '.join(FAMILIES)}",
        )
    stored = config.get("quantization_config")
    method = stored.get("quant_method", "bitsandbytes") if isinstance(stored, dict) else stored
    if stored and (method != "bitsandbytes" or not isinstance(stored, dict)):
        raise ModelError(
            f"{path}: the weights are quantized by {str(method)[:60]!r}, which is not supported",
            "give the original 16-bit model (--bits quantizes it), or one that bitsandbytes "
            "quantized",
        )
    for key, value in _numbers(config):
        if not abs(value) <= LARGEST.get(key, LARGEST_NUMBER):  # NaN is not
            raise ModelError(
                f"{path}: {key} is {str(value)[:60]}, above {LARGEST.get(key, LARGEST_NUMBER)}",
                "correct the file",
            )
        if key in COUNTS and value < 1:
            raise ModelError(f"{path}: {key} is {value}, below 1", "correct the file")
    divisor = config.get("logits_scaling", 1)
    if kind == "granite" and not (isinstance(divisor, (int, float)) and divisor > 0):
        raise ModelError(
            f"{path}: logits_scaling is {str(divisor)[:60]!r}, not a number above 0",
            "correct the file",
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a config with its nearest key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)):
        yield key, value


def _expert_bytes(config: Mapping[str, Any]) -> int:
    """Bytes in 16 bits of all experts, each a gated MLP of three matrices."""
    experts = max(_whole(config, key) for key in EXPERT_COUNTS)
    inner = _whole(config, "moe_intermediate_size") or _whole(config, "intermediate_size")
    layers = _whole(config, "num_hidden_layers") - _whole(config, "first_k_dense_replace")
    layers //= max(1, _whole(config, "decoder_sparse_step"))
    return 2 * 3 * layers * experts * _whole(config, "hidden_size") * inner


def _conv1d_bytes(config: Mapping[str, Any]) -> int:
    """Bytes in 16 bits of GPT-2's layers: queries, keys, values, output, and a two-matrix MLP."""
    width = _whole(config, "n_embd")
    inner = _whole(config, "n_inner") or 4 * width
    return 2 * _whole(config, "n_layer") * (4 * width * width + 2 * width * inner)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _size(count: int) -> str:
    return f"{count} bytes ({count / 1024**3:.1f} GiB)" if count else "most of it"

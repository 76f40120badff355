"""Which model families are supported, and why another one is not: told from config.json alone.

A family is a `model_type` of transformers whose decoder consists of ordinary linear layers. What
is refused is refused by name, with the bytes that would stay in 16 bits where that is the reason:
a base that is called quantized and mostly is not would be a lie about memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base.fields import LARGEST, asks_for_code, problems
from qlora_kit.errors import ModelError, UnsafeInputError

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


def check_family(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a `config` (from `path`) of a model that cannot be quantized and trained whole.

    Errors: `ModelError`, `UnsafeInputError`.
    """
    kind = config.get("model_type")
    refuse_code(config, path)
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
    wrong = list(problems(config))
    if wrong:
        raise ModelError(f"{path}: {'; '.join(wrong)}", "correct the file")


def refuse_code(said: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of settings that has something fetched or run. Errors: `UnsafeInputError`."""
    if asked := asks_for_code(said):
        raise UnsafeInputError(
            f"{path}: {asked[0]} is {str(asked[1])[:60]!r}, which transformers would fetch or run",
            "remove it from the file: nothing that a model names is fetched or run",
        )


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
    return min(value, LARGEST) if isinstance(value, int) and value > 0 else 0


def _size(count: int) -> str:
    return f"{count} bytes ({count / 1024**3:.1f} GiB)" if count else "most of it"

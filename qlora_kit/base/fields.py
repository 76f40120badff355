"""What the fields of a config.json may hold: each that reaches a model has its type and bounds.

Bounds are far above every known model and far below what would take minutes or gigabytes before a
plan refuses it. A field that is not here does not reach the model (`MODEL_FIELDS` is what
transformers is given), so that no file sets an attribute of a class that it should not know of.
Fields that ask for code or for a download are refused by name. What a config counts as experts is
not always built (`has_experts`): then the model is dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.base.field import LARGEST, Field, either, list_of, number, one_of, or_null, whole

LARGEST_ID = 2**24
TOKENS_LIMIT = 1000
"""Tokens in a list that end a text."""
HEAD_DIM_LIMIT = 2**13
HEADS_LIMIT = 2**9
"""Four times the most that a known model has; attention goes through them one by one."""
PLAIN_ATTENTION = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
"""Names that transformers knows by itself; how attention is computed here is not the file's say."""
ASKS_FOR_CODE = (
    # Each makes transformers import, fetch or run what a file names.
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
ASKS_FOR_MORE = (
    "trust_remote_code",
    "custom_pipelines",
    "custom_generate",
    "use_kernels",
    "kernel_config",
    "compression_config",
    "configuration_files",
)


FLAG = Field(lambda value: isinstance(value, bool), "true or false")
TEXT = Field(
    lambda value: isinstance(value, str) and len(value) <= 200 and value.isprintable(),
    "a text of at most 200 characters",
)
DECIMAL = Field(
    lambda value: type(value) is float and abs(value) <= LARGEST,
    f"a number from {-LARGEST:g} to {LARGEST:g}",
)
# A config may name a token that is no token (`pad_token_id` -1): it is not used then.
TOKEN = whole(-1, LARGEST_ID)
TOKENS = or_null(either(TOKEN, list_of(TOKEN, TOKENS_LIMIT)))
ACTIVATION = one_of(
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu"
)
RATE = number(0, 1)
FACTOR = number(0, 10**6, above=True)
ROPE_TYPE = one_of(
    "default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional"
)
ROPE_FIELDS = {
    "type": ROPE_TYPE,
    "rope_type": ROPE_TYPE,
    "rope_theta": number(0, above=True),
    "factor": FACTOR,
    "original_max_position_embeddings": whole(1),
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "attention_factor": or_null(FACTOR),
    "beta_fast": or_null(FACTOR),
    "beta_slow": or_null(FACTOR),
    "mscale": FACTOR,
    "mscale_all_dim": number(0, 10**6),
    "short_factor": list_of(FACTOR, HEAD_DIM_LIMIT),
    "long_factor": list_of(FACTOR, HEAD_DIM_LIMIT),
    "short_mscale": FACTOR,
    "long_mscale": FACTOR,
    "partial_rotary_factor": number(0, 1, above=True),
    "truncate": FLAG,
    "finetuned": FLAG,
    "llama_4_scaling_beta": number(0, 10**6),
}
ANY = either(FLAG, either(whole(-LARGEST_ID, LARGEST_ID), either(DECIMAL, TEXT)))
DEPTH_LIMIT, LENGTH_LIMIT = 4, 4096
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE = or_null(Field(lambda value: isinstance(value, dict), "an object"))
LAYER_FIELDS = {
    # What a layer may have otherwise than the model.
    "head_dim": whole(2, HEAD_DIM_LIMIT),
    "num_key_value_heads": whole(1, HEADS_LIMIT),
}
PER_LAYER = Field(
    lambda value: (
        isinstance(value, dict)
        and len(value) <= 1000
        and all(re.fullmatch(r"\d{1,3}", str(number)) for number in value)
        and all(_is_layer(layer) for layer in value.values())
    ),
    f"an object of layers by number, each with {' and '.join(LAYER_FIELDS)} alone",
)
MODEL_FIELDS = {
    "vocab_size": whole(1, LARGEST_ID),
    "hidden_size": whole(1, 2**17),
    "intermediate_size": whole(1, 2**20),
    "num_hidden_layers": whole(1, 1000),
    "num_attention_heads": whole(1, HEADS_LIMIT),
    "num_key_value_heads": or_null(whole(1, HEADS_LIMIT)),
    "head_dim": or_null(whole(2, HEAD_DIM_LIMIT)),
    "max_position_embeddings": whole(1),
    "original_max_position_embeddings": whole(1),
    "sliding_window": or_null(whole(1)),
    "max_window_layers": whole(0, 1000),
    "use_sliding_window": FLAG,
    "layer_types": or_null(list_of(one_of(*LAYER_TYPES), 1000)),
    "hidden_act": ACTIVATION,
    "hidden_activation": or_null(ACTIVATION),
    "rms_norm_eps": number(0, 1),
    "initializer_range": number(0, 10**3),
    "rope_theta": number(0, above=True),
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "partial_rotary_factor": number(0, 1, above=True),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "use_cache": FLAG,
    "attention_dropout": or_null(RATE),
    "resid_pdrop": RATE,
    "embd_pdrop": RATE,
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": or_null(TOKEN),
    "query_pre_attn_scalar": number(0, above=True),
    "final_logit_softcapping": or_null(number(0, 10**6, above=True)),
    "attn_logit_softcapping": or_null(number(0, 10**6, above=True)),
    "embedding_multiplier": number(-(10**6), 10**6),
    "residual_multiplier": number(-(10**6), 10**6),
    "attention_multiplier": number(-(10**6), 10**6),
    "logits_scaling": number(0, 10**6, above=True),
    "rope_local_base_freq": number(0, above=True),
    "sliding_window_pattern": whole(1, 1000),
    "per_layer_config": PER_LAYER,
    "global_head_dim": whole(2, HEAD_DIM_LIMIT),
    "num_global_key_value_heads": or_null(whole(1, HEADS_LIMIT)),
    "attention_k_eq_v": FLAG,
    "num_kv_shared_layers": whole(0, 1000),
    "use_double_wide_mlp": FLAG,
    "vocab_size_per_layer_input": whole(1, LARGEST_ID),
    "hidden_size_per_layer_input": whole(0, 2**17),
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
NEVER = Field(lambda value: value is False, "false")
SAID_FIELDS = {
    # What is read here and not handed on.
    "dtype": or_null(one_of(*DTYPES, *(f"torch.{name}" for name in DTYPES))),
    "torch_dtype": or_null(one_of(*DTYPES, *(f"torch.{name}" for name in DTYPES))),
    # Of images, which this text model does not see.
    "use_bidirectional_attention": or_null(either(NEVER, one_of("vision"))),
    "enable_moe_block": NEVER,
}


OTHER_FIELDS = {
    # Of families whose class knows what it takes.
    "layer_types": or_null(list_of(TEXT, 1000)),
    "hidden_act": or_null(TEXT),
    "hidden_activation": or_null(TEXT),
    "query_pre_attn_scalar": or_null(number(0, above=True)),
    "max_window_layers": or_null(whole(0, 1000)),
    "use_sliding_window": or_null(FLAG),
    "rope_theta": or_null(number(0, above=True)),
    "intermediate_size": or_null(either(whole(1, 2**20), list_of(whole(1, 2**20), 1000))),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), whole(1, 1000)),
    **dict.fromkeys(("n_head", "n_heads"), whole(1, HEADS_LIMIT)),
    **dict.fromkeys(("n_embd", "d_model", "n_embed"), whole(1, 2**17)),
}


def beyond(value: Any, name: str = "", depth: int = 0) -> Iterator[str]:
    """Which values of a config are beyond the bounds of any field, those apart that are here."""
    if isinstance(value, dict):
        if depth > DEPTH_LIMIT or len(value) > LENGTH_LIMIT:
            yield f"{name} has more than {LENGTH_LIMIT} fields or {DEPTH_LIMIT} levels"
            return
        for key, inner in value.items():
            if depth or (key not in MODEL_FIELDS and key not in OTHER_FIELDS):
                yield from beyond(inner, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, list):
        if depth > DEPTH_LIMIT or len(value) > LENGTH_LIMIT:
            yield f"{name} has more than {LENGTH_LIMIT} values or {DEPTH_LIMIT} levels"
            return
        for inner in value:
            yield from beyond(inner, name, depth + 1)
    elif value is not None and not ANY.accepts(value):
        yield f"{name} is {repr(value)[:60]}, not {ANY.allowed}"


def asks_for_code(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first field by which a config would have something fetched or run, and its value."""
    for key in ASKS_FOR_CODE:
        value = config.get(key)
        names = list(value.values()) if isinstance(value, dict) else [value]
        if not all(name is None or name in PLAIN_ATTENTION for name in names):
            return key, value
    return next(((key, config[key]) for key in ASKS_FOR_MORE if config.get(key)), None)


def _is_layer(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and layer.keys() <= LAYER_FIELDS.keys()
        and all(LAYER_FIELDS[name].accepts(value) for name, value in layer.items())
    )


def problems(config: Mapping[str, Any], strict: bool = True) -> Iterator[str]:
    """What is wrong with the fields of a config, each with its value and what is allowed.

    Of a family that is not `strict` some may hold more: its class checks their values.
    """
    yield from _wrong(config, {**MODEL_FIELDS, **SAID_FIELDS, **({} if strict else OTHER_FIELDS)})
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        # One for all layers, or one for each type of layer.
        parts = [part for part in rope.values() if isinstance(part, dict)]
        for problem in (found for part in (rope, *parts) for found in _wrong(part, ROPE_FIELDS)):
            yield f"{key}: {problem}"
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is int and heads > 0:
        grouped = config.get("num_key_value_heads")
        if type(grouped) is int and grouped > 0 and heads % grouped:
            yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {grouped}"
        if config.get("head_dim") is None and type(width) is int and width % heads:
            yield f"hidden_size {width} is no multiple of num_attention_heads {heads}"


def _wrong(said: Mapping[str, Any], fields: Mapping[str, Field]) -> Iterator[str]:
    for key, field in fields.items():
        if key in said and not field.accepts(said[key]):
            yield f"{key} is {repr(said[key])[:60]}, not {field.allowed}"


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

"""A family without a record: the fields of its config, and what transformers' class says of it.

Its config class declares what a config.json may set. Of that a model gets the fields that the class
itself adds (none of the base class, which can change what a forward returns), each within bounds
(`base/fields.py`), and their types are checked by the class. What draws random numbers is set to 0,
and no weights are drawn where there is no storage for them.
A built model is refused where its modules say that it cannot be trained.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from qlora_kit.base.fields import beyond
from qlora_kit.base.skipped import large_others
from qlora_kit.errors import ModelError
from qlora_kit.options.checks import size_text

TABLES_LIMIT = 2**30
"""Bytes of the tables that a model computes when it is built."""
OLD_NAMES = (
    # What the classes of some families convert to what they declare.
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "head_dim",
    "rotary_pct",
    "rotary_emb_base",
    "rotary_dim",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
    "swa_rope_theta",
    "sliding_window_pattern",
    "full_attention_interval",
    "hybrid_override_pattern",
    "block_ff_dim",
    "tie_word_embeddings",
    "tie_embedding",
    "n_embed",
    "use_bias",
    "qkv_bias",
)


def declared_fields(
    config: Mapping[str, Any], family: type[PreTrainedConfig], undeclared: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of `config` that its class gets, `undeclared` ones too; its dropout is off.

    Errors: `ValueError` for values beyond the bounds of any field.
    """
    ours = {field.name: field for field in dataclasses.fields(family)}  # type: ignore[arg-type]
    for field in dataclasses.fields(PreTrainedConfig):  # type: ignore[arg-type]
        ours.pop(field.name, None)
    names = {*ours, *family.attribute_map, *OLD_NAMES, *undeclared}
    described = {name: copy.deepcopy(config[name]) for name in config if name in names}
    if wrong := list(beyond(described)):
        raise ValueError("; ".join(wrong))
    described = {name: _with_infinities(value) for name, value in described.items()}
    for name, field in ours.items():
        value = described.get(name, field.default)
        if is_dropout(name) and type(value) in (float, int):
            described[name] = type(value)(0)
    for value in described.values():
        if isinstance(value, dict):
            value |= {
                name: type(one)(0)
                for name, one in value.items()
                if is_dropout(name) and type(one) in (float, int)
            }
    return described


def _with_infinities(value: Any) -> Any:
    """A value with the infinities that transformers writes into JSON as objects."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])
        return {name: _with_infinities(one) for name, one in value.items()}
    return [_with_infinities(one) for one in value] if isinstance(value, list) else value


def is_dropout(name: str) -> bool:
    """Whether a field of that name says how much is dropped at random."""
    return "dropout" in name or name.endswith(("pdrop", "_drop", "layerdrop"))


def attention_of(settings: PreTrainedConfig) -> str:
    """How the class that transformers builds from `settings` can attend: `sdpa`, else `eager`."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    return "sdpa" if family._supports_sdpa else "eager"


def check_generic(settings: PreTrainedConfig, dtype: torch.dtype, path: Path) -> None:
    """Refuse settings (of `path`) of a model that cannot be quantized and trained whole.

    Errors: `ModelError` with the reason, `ValueError` for tables that are huge, and what
    transformers raises where it cannot build the model.
    """
    kind = f"{path}: model_type {settings.model_type!r}"
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(
            f"{kind} is an encoder and a decoder, of which the decoder alone predicts nothing",
            "give a model that is a decoder alone",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention_of(settings)
        )
    if reason := unfit(model):
        raise ModelError(f"{kind} {reason}", "use a model of another family")
    taken = sum(buffer.nbytes for buffer in model.buffers())
    if taken > TABLES_LIMIT:
        raise ValueError(f"its tables would take {taken} bytes")
    if others := large_others(model):
        size = sum(others.values()) * dtype.itemsize
        raise ModelError(
            f"{kind} keeps {', '.join(others)} as no linear layers, so that {size} bytes "
            f"({size_text(size)}) would stay unquantized",
            "use a model of another family",
        )


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, models are built whose parameters have no storage, and are not drawn either.

    Buffers are real: rotary tables are computed when the modules are made. transformers leaves out
    what it draws only where they too are on the meta device (5.23), and it is half of a build.
    """
    from accelerate import init_empty_weights

    initialize = PreTrainedModel.initialize_weights

    def buffers_alone(model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            if parameter.is_meta:
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        initialize(model)

    PreTrainedModel.initialize_weights = buffers_alone
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        PreTrainedModel.initialize_weights = initialize


def turn_off_dropout(model: nn.Module) -> None:
    """Let no dropout of a built model drop anything."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


ENCODED = ("encoder_attn", "crossattention", "cross_attn", "cross_attention")
"""What attention to the output of an encoder is called."""
OWN_REASONS = {
    "blt": "cuts a text into patches where a second model of it says so: shapes that follow from "
    "the text can neither be planned nor trained here",
    "rwkv": "multiplies and divides its own weights when it goes from training to evaluation and "
    "back, which quantized ones and adapters do not follow",
    "xlm": "keeps attention and MLPs in two lists of modules, not in one of layers, so that "
    "they can be neither recomputed nor looked at layer by layer",
}


def unfit(model: Any) -> str | None:
    """The reason in words that follow the model's name, or None."""
    settings = model.config
    if reason := OWN_REASONS.get(settings.model_type):
        return reason
    names = (name for name, _ in model.named_modules())
    if name := next((one for one in names if one.rpartition(".")[2] in ENCODED), None):
        return f"attends to the output of an encoder ({name}), which is not there"
    if getattr(settings, "default_language", "") is None:
        return "has an adapter for each language, and config.json names no default_language"
    return None

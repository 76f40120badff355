"""What a GGUF says of a model: its name, the numbers of its config, and what it cannot say of it.

What llama.cpp would drop or do otherwise is refused by name before a weight is read. A sliding
window that it does not have is a note: texts up to the window's length are read alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.gguf_facts import CAPS, Gguf
from qlora_kit.errors import ModelError
from qlora_kit.gguf.file import Value
from qlora_kit.gguf.layout import gguf_facts, import_gguf
from qlora_kit.gguf.rope import LOCAL, head_dim, rope_of
from qlora_kit.gguf.spaces import general_name

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of a file whose matrices are of a type."""
HUB = "https://huggingface.co"
BIASES = ("attention_bias", "mlp_bias")
LARGEST_FLOAT = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Metadata:
    """Keys and values, the tensors that are no weights, and what a user should know.

    `context` is the most tokens up to which llama.cpp computes what transformers does.
    """

    fields: tuple[tuple[str, Value], ...]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    context: int


def general(
    base: str, is_hub_id: bool, parameters: int, kind: str, strips: bool
) -> list[tuple[str, Value]]:
    """The keys under `general`, of a model made of `base`: a hub id, or a path, which stays here.

    `parameters` are the numbers in its weights; `strips` is the tokenizer's (`spaces.py`).
    """
    gguf = import_gguf()
    return [
        ("general.type", "model"),
        ("general.name", general_name(base.rstrip("/").rpartition("/")[2], strips)),
        ("general.size_label", gguf.size_label(parameters, parameters, 0, 0)),
        ("general.file_type", FILE_TYPES[kind]),
        ("general.quantization_version", int(gguf.GGML_QUANT_VERSION)),
        *base_model(base, is_hub_id),
    ]


def base_model(base: str, is_hub_id: bool) -> list[tuple[str, Value]]:
    """The keys that name the model that a file comes from, or belongs to; as `general`."""
    owner, _, name = base.rstrip("/").rpartition("/")
    found: list[tuple[str, Value]] = [
        ("general.base_model.count", 1),
        ("general.base_model.0.name", name),
    ]
    if is_hub_id and owner:
        found.append(("general.base_model.0.organization", owner))
        found.append(("general.base_model.0.repo_url", f"{HUB}/{base}"))
    return found


def metadata(config: Any, rows: int) -> Metadata:
    """What a file says of a model of this config of transformers, its embedding of `rows` rows.

    Errors: `ModelError` with everything that llama.cpp would do otherwise.
    """
    facts = gguf_facts(config.model_type)
    rope = rope_of(config, facts)
    _refuse([*_unsaid(config, facts), *rope.unsaid], config.model_type)
    width = head_dim(config)
    said: list[tuple[str, Value]] = [
        ("context_length", int(config.max_position_embeddings)),
        ("embedding_length", int(config.hidden_size)),
        ("block_count", int(config.num_hidden_layers)),
        ("feed_forward_length", int(config.intermediate_size)),
        ("attention.head_count", int(config.num_attention_heads)),
        ("attention.head_count_kv", int(config.num_key_value_heads)),
        ("attention.key_length", width),
        ("attention.value_length", width),
        ("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)),
        ("vocab_size", rows),
        *_windows(config, facts),
        *((cap, float(getattr(config, cap))) for cap in facts.caps if _has(config, cap)),
        *((key, float(getattr(config, name))) for key, name in facts.scales),
        *rope.fields,
    ]
    _refuse(_too_large(said), config.model_type)
    fields = tuple((f"{facts.architecture}.{key}", value) for key, value in said)
    context, notes = int(config.max_position_embeddings), rope.notes
    if (window := _ignored_window(config, facts)) is not None and window < context:
        notes.append(
            f"llama.cpp has no sliding window in {facts.architecture} models: of a text longer "
            f"than {window} tokens it attends to all"
        )
        context = window
    if rope.original is not None:
        context = min(context, rope.original)
    return Metadata(fields, rope.tensors, tuple(notes), context)


def _refuse(unsaid: Sequence[str], model_type: str) -> None:
    if unsaid:
        raise ModelError(
            f"llama.cpp has nothing for {'; '.join(unsaid)} in models of {model_type}",
            "export with --format hf",
        )


def _too_large(said: Sequence[tuple[str, Value]]) -> list[str]:
    """The numbers that 32 bits do not hold, a phrase each."""
    return [
        f"{key} {value} (it has 32 bits)"
        for key, value in said
        if (isinstance(value, int) and not 0 <= value < 2**32)
        or (isinstance(value, float) and not abs(value) <= LARGEST_FLOAT)
    ]


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _unsaid(config: Any, facts: Gguf) -> Iterator[str]:
    """What of a config llama.cpp has nothing for, a phrase each."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != facts.activation:
        yield f"the activation {activation} (it has {facts.activation})"
    for name in BIASES:
        if getattr(config, name, False) and name not in facts.biases:
            yield name
    shared = config.hidden_size // config.num_attention_heads
    if head_dim(config) != shared and not facts.own_head_dim:
        yield f"head_dim {head_dim(config)} (it has {shared})"
    if not config.tie_word_embeddings and not facts.untied:
        yield "tie_word_embeddings false"
    if getattr(config, "use_bidirectional_attention", False):
        yield "use_bidirectional_attention"
    for name in CAPS:
        if _has(config, name) and name not in facts.caps:
            yield f"{name} {getattr(config, name):g}"
        if name in facts.always and not _has(config, name):
            yield f"{name} null"
    if facts.wide_scale_at is not None:
        wide = config.num_hidden_layers == facts.wide_scale_at
        scalar = shared if wide else head_dim(config)
        if config.query_pre_attn_scalar != scalar:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it has {scalar})"
    if facts.windows and _period(config) is None:
        yield "layer_types in which full attention has no period"
    if (every := facts.unturned_every) is not None:
        turned = [bool(one) for one in config.no_rope_layers[: config.num_hidden_layers]]
        if turned != [bool((layer + 1) % every) for layer in range(len(turned))]:
            yield f"no_rope_layers other than each {every}th"


def _windows(config: Any, facts: Gguf) -> Iterator[tuple[str, Value]]:
    if facts.names_window:
        yield "attention.sliding_window", int(config.sliding_window or 0)
    period = _period(config) if facts.windows else 1
    if period != 1:
        assert period is not None  # it was refused
        yield "attention.sliding_window", int(config.sliding_window)
        yield "attention.sliding_window_pattern", period
    elif facts.assumes_windows:
        # It takes no pattern without any: its windows are as long as texts are.
        yield "attention.sliding_window", int(config.max_position_embeddings)


def _period(config: Any) -> int | None:
    """The n of which each n-th layer alone has no window; 0 where all have one, None for no n."""
    local = [kind == LOCAL for kind in config.layer_types]
    period = local.index(False) + 1 if False in local else 0
    expected = [not period or layer % period < period - 1 for layer in range(len(local))]
    return period if local == expected else None


def _ignored_window(config: Any, facts: Gguf) -> int | None:
    """The length of a sliding window that llama.cpp does not have."""
    window, types = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
    if facts.windows or not window or (types is not None and LOCAL not in types):
        return None
    return int(window)

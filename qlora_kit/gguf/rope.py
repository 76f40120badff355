"""The rotary embedding of a model in a GGUF: its keys, and its factors as tensors.

Turning slower by one factor (`linear`) and YaRN are keys. What Llama 3 and Phi-3 (`longrope`) do is
a factor for each pair of rows, a tensor; for it llama.cpp divides the angle by the factor. Phi-3
has two: llama.cpp takes one for a whole context, by its length, where transformers goes by the
length of a text. What depends on the text in another way (`dynamic`) has no place in a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_kit.base.gguf_facts import Gguf
from qlora_kit.gguf.file import Value

CPU = torch.device("cpu")
LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclass
class Rope:
    """What a file says of a rotary embedding, what it cannot say, and what a user should know.

    `original` is the context above which llama.cpp takes other factors for every text.
    """

    fields: list[tuple[str, Value]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unsaid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    original: int | None = None


def rope_of(config: Any, facts: Gguf) -> Rope:
    """The rotary embedding of a config of transformers, its keys without the architecture."""
    rope, said = Rope(), config.rope_parameters
    if GLOBAL in said:
        local, said = said[LOCAL], said[GLOBAL]
        rope.fields.append(("rope.freq_base_swa", float(local["rope_theta"])))
        if (kind := local["rope_type"]) != "default":
            rope.unsaid.append(f"rope_type {kind} in sliding windows (it has default)")
    kind = said["rope_type"]
    rope.fields.append(("rope.freq_base", float(said["rope_theta"])))
    width = head_dim(config)
    share = float(said.get("partial_rotary_factor") or 1.0)
    turned = int(width * share)
    rope.fields.append(("rope.dimension_count", turned))
    if turned != width and not facts.turns_part:
        rope.unsaid.append(f"partial_rotary_factor {share:g}")
    if kind not in facts.rope:
        rope.unsaid.append(f"rope_type {kind} (it has {', '.join(facts.rope)})")
    elif kind == "linear":
        rope.fields.append(("rope.scaling.type", "linear"))
        rope.fields.append(("rope.scaling.factor", float(said["factor"])))
    elif kind == "yarn":
        _yarn(rope, config, said)
    elif kind == "llama3":
        rope.tensors["rope_freqs.weight"] = _slower(config, kind)
    elif kind == "longrope":
        _longrope(rope, config, said)
    return rope


def head_dim(config: Any) -> int:
    """The width of a head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _slower(config: Any, kind: str) -> Tensor:
    """By how much each pair of rows turns slower than without scaling, (pairs,)."""
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, CPU)
    width, base = head_dim(config), config.rope_parameters["rope_theta"]
    # As transformers computes it, so that what is not slowed has a factor of exactly 1.
    plain = 1.0 / base ** (torch.arange(0, width, 2).float() / width)
    factors: Tensor = plain / scaled
    return factors


def _yarn(rope: Rope, config: Any, said: Mapping[str, Any]) -> None:
    original = int(said["original_max_position_embeddings"])
    factor = float(said.get("factor") or config.max_position_embeddings / original)
    rope.fields += [
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", factor),
        ("rope.scaling.original_context_length", original),
    ]
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (beta := said.get(name) or usual) != usual:
            rope.unsaid.append(f"{name} {beta:g} of YaRN (it has {usual:g})")
    # What both multiply queries and keys by where nothing else is said.
    scale = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    if not math.isclose(attention, scale, rel_tol=1e-6):
        rope.unsaid.append(f"the attention factor {attention:g} of YaRN (it has {scale:g})")
    if said.get("truncate") is False:
        rope.unsaid.append("truncate false of YaRN")


def _longrope(rope: Rope, config: Any, said: Mapping[str, Any]) -> None:
    original = int(said["original_max_position_embeddings"])
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, CPU)
    rope.fields += [
        ("rope.scaling.original_context_length", original),
        ("rope.scaling.attn_factor", float(attention)),
    ]
    for name in ("long", "short"):
        factors = torch.tensor(said[f"{name}_factor"], dtype=torch.float32)
        rope.tensors[f"rope_factors_{name}.weight"] = factors
    rope.original = original
    rope.notes.append(
        f"run llama.cpp with a context of at most {original} tokens (-c {original}) unless texts "
        "are longer: in a longer one it takes the long factors for every text, transformers for "
        "longer texts alone"
    )

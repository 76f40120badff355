"""What a config says and llama.cpp has nothing for is refused by name, or said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import LONG_ROPE, tiny_model
from gguf_models import LINEAR, LONG, YARN

from qlora_kit.errors import ModelError
from qlora_kit.gguf.metadata import Metadata, metadata

GEMMA = {"query_pre_attn_scalar": 32}
FULL = {"rope_type": "default", "rope_theta": 10000.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama2", {"hidden_act": "gelu"}, r"the activation gelu \(it has silu\)"),
    ("llama2", {"rope_parameters": FULL | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama2", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "rope_type dynamic"),
    ("llama2", {"rope_parameters": YARN | {"beta_fast": 8.0}}, r"beta_fast 8 of YaRN \(it has 32"),
    ("llama2", {"rope_parameters": YARN | {"attention_factor": 1.3}}, "attention factor 1.3"),
    ("llama2", {"rope_parameters": YARN | {"truncate": False}}, "truncate false"),
    ("qwen2", {"head_dim": 32}, r"head_dim 32 \(it has 16\)"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("smollm3", {"attention_bias": True, "no_rope_layers": [1, 1]}, "attention_bias"),
    ("smollm3", {"mlp_bias": True, "no_rope_layers": [1, 1]}, "mlp_bias"),
    ("smollm3", {}, "no_rope_layers other than each 4th"),
    ("gemma2", {"query_pre_attn_scalar": 24}, r"query_pre_attn_scalar 24 \(it has 32\)"),
    ("gemma2", {**GEMMA, "tie_word_embeddings": False}, "tie_word_embeddings false"),
    ("gemma2", {**GEMMA, "attention_bias": True}, "attention_bias"),
    ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "attn_logit_softcapping null"),
    ("gemma2", {**GEMMA, "final_logit_softcapping": None}, "final_logit_softcapping null"),
    ("gemma2", {**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24"),
    ("gemma3", {**GEMMA, "attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5"),
    (
        "gemma3",
        {**GEMMA, "rope_parameters": {"full_attention": FULL, "sliding_attention": LINEAR}},
        r"rope_type linear in sliding windows \(it has default\)",
    ),
    (
        "gemma3",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "layer_types in which full attention has no period",
    ),
    ("llama2", {"max_position_embeddings": 2**32}, r"context_length 4294967296 \(it has 32 bits"),
    ("llama2", {"rope_parameters": FULL | {"rope_theta": 1e39}}, r"rope.freq_base 1e\+39 \(it"),
]


def said(family: str, **changes: Any) -> Metadata:
    """What a file says of a tiny model."""
    with torch.device("meta"):
        config = tiny_model(family, **changes).config
    return metadata(config, 264)


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_llama_cpp_has_nothing_for_is_refused(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=f"llama.cpp has nothing for .*{words}") as caught:
        said(family, **changes)
    assert caught.value.remedy == "export with --format hf"


def test_all_that_is_refused_is_said_at_once() -> None:
    with pytest.raises(ModelError, match=r"pytorch_tanh\); attention_bias; query_pre") as caught:
        said("gemma2", hidden_activation="silu", attention_bias=True)
    assert "in models of gemma2" in str(caught.value)


@pytest.mark.parametrize(("family", "window"), [("mistral", 8), ("phi4", 8), ("qwen2", 8)])
def test_a_window_that_is_ignored_is_said(family: str, window: int) -> None:
    changes = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    (note,) = said(family, sliding_window=window, **changes).notes
    assert "no sliding window" in note
    assert "longer than 8 tokens" in note
    # One that no text is longer than matters to nobody.
    assert said(family, sliding_window=128, **changes).notes == ()


@pytest.mark.parametrize("window", [8, None])
def test_phi_3_names_a_window(window: int | None) -> None:
    """llama.cpp ignores it; its older releases refuse a file that names none."""
    fields = dict(said("phi4", sliding_window=window).fields)
    assert fields["phi3.attention.sliding_window"] == (window or 0)


def test_phi_3_says_which_context_has_the_short_factors() -> None:
    (note,) = said("phi3", rope_scaling=LONG_ROPE, **LONG).notes
    assert "-c 256" in note


@pytest.mark.parametrize(
    ("types", "period"),
    [
        (["sliding_attention"] * 5 + ["full_attention"], 6),
        (["sliding_attention"] * 6, 0),
        (["full_attention"] * 6, None),
        (["sliding_attention", "full_attention"] * 3, 2),
    ],
)
def test_windows_by_their_period(types: list[str], period: int | None) -> None:
    fields = dict(said("gemma3", **GEMMA, num_hidden_layers=6, layer_types=types).fields)
    assert fields.get("gemma3.attention.sliding_window_pattern") == period
    assert ("gemma3.attention.sliding_window" in fields) == (period is not None)


@pytest.mark.parametrize("window", [8, None])
def test_gemma_2_without_windows_has_long_ones(window: int | None) -> None:
    """llama.cpp has a window of 4096 tokens in every second layer where a file says nothing."""
    full = {"layer_types": ["full_attention"] * 2, "sliding_window": window}
    fields = dict(said("gemma2", **GEMMA, **full, max_position_embeddings=8192).fields)
    assert fields["gemma2.attention.sliding_window"] == 8192
    assert "gemma2.attention.sliding_window_pattern" not in fields


def test_gemma_of_27_billion_scales_by_its_width() -> None:
    """llama.cpp knows it by its number of layers alone."""
    config = tiny_model("gemma2", query_pre_attn_scalar=16).config
    with pytest.raises(ModelError, match=r"query_pre_attn_scalar 16 \(it has 32\)"):
        metadata(config, 264)
    config.num_hidden_layers = 46
    assert metadata(config, 264).fields


def test_factors_of_llama_3_are_one_where_nothing_is_slowed() -> None:
    factors = said("llama3").tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8, rel=1e-6)

"""Laws of config.json: every field that reaches a model has its bounds, and nothing else does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import TRAITS, edit_config, refused, save_checkpoint, tiny_model

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.checks import read_base, read_config
from qlora_kit.base.fields import MODEL_FIELDS, ROPE_FIELDS, problems
from qlora_kit.base.load import load_base
from qlora_kit.base.meta_model import build_on_meta
from qlora_kit.base.source import Source
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.errors import ModelError, UnsafeInputError


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    place = tmp_path_factory.mktemp("fields") / "model"
    save_checkpoint(place, "llama_bias")
    return place


@pytest.fixture
def model(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 0}, "sliding_window is 0, not a whole number from 1"),
        ({"sliding_window": -1}, "sliding_window is -1, not a whole number from 1"),
        ({"sliding_window": "x"}, "sliding_window is 'x', not a whole number from 1"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"sliding_window": 4.5}, "sliding_window is 4.5"),
        ({"num_attention_heads": 4096, "hidden_size": 4096}, "num_attention_heads is 4096"),
        (
            {"num_attention_heads": 3, "head_dim": None},
            "hidden_size 64 is no multiple of num_attention_heads 3",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776, not a whole number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings is 1000000000000000000"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": 0}, "rope_theta is 0, not a number above 0"),
        ({"rope_scaling": 5}, "rope_scaling is 5, not an object or null"),
        ({"rope_scaling": {"rope_type": "own"}}, "rope_scaling: rope_type is 'own', not one of"),
        ({"rope_scaling": {"factor": 0}}, "rope_scaling: factor is 0"),
        ({"rope_parameters": {"long_factor": [0]}}, "rope_parameters: long_factor is [0]"),
        ({"eos_token_id": [1] * 5000}, "eos_token_id is [1, 1"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"torch_dtype": "load"}, "torch_dtype is 'load', not one of float16, bfloat16"),
        ({"dtype": ["float32"]}, "dtype is ['float32']"),
        ({"hidden_act": "os.system"}, "hidden_act is 'os.system', not one of silu"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ({"attention_dropout": 2}, "attention_dropout is 2"),
        ({"layer_types": ["own"]}, "layer_types is ['own']"),
        # All at once.
        ({"hidden_size": 0, "vocab_size": []}, "vocab_size is [], not a whole number"),
        ({"hidden_size": 0, "vocab_size": []}, "hidden_size is 0, not a whole number"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_value_that_cannot_be_is_named_with_what_can(model, changes, said):
    edit_config(model, **changes)
    with refused(ModelError, "config.json: ", said, directory=model):
        read_base(Source("model", None, model))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "evil/repo"),
        ("_attn_implementation", "kernels-community/flash-attn@main:own"),
        ("_attn_implementation_internal", "evil/repo"),
        ("attn_implementation", {"": "sdpa", "text_config": "evil/repo"}),
        ("attn_implementation", ["sdpa"]),
        ("experts_implementation", "evil/repo"),
        ("trust_remote_code", True),
        ("custom_pipelines", {"own": {"impl": "own.Own"}}),
        ("configuration_files", ["config.4.0.0.json"]),
        ("use_kernels", True),
        ("auto_map", {"AutoModelForCausalLM": "evil/repo--modeling.Own"}),
    ],
)
def test_what_asks_for_code_or_a_download_is_refused_by_name(model, field, value):
    edit_config(model, **{field: value})
    with refused(UnsafeInputError, f"config.json: {field} ", " run", directory=model):
        read_base(Source("model", None, model))


def test_so_is_the_code_of_a_generation_config(model):
    path = model / "generation_config.json"
    path.write_text(json.dumps({"custom_generate": "evil/repo"}))
    said = "generation_config.json: custom_generate is 'evil/repo'"
    with refused(UnsafeInputError, said, directory=model):
        read_base(Source("model", None, model))


def test_so_is_the_code_of_a_tokenizer(model):
    path = model / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil/repo--tokenization.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with refused(UnsafeInputError, "tokenizer_config.json: auto_map asks to run", directory=model):
        load_tokenizer(model)


def test_the_names_of_attention_that_real_files_hold_are_not_the_files_say(model):
    edit_config(model, attn_implementation="flash_attention_2", _attn_implementation="eager")
    loaded = load_base(str(model), bits=16, device="cpu").model
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", TRAITS)
def test_every_config_that_transformers_writes_of_a_family_is_accepted(family):
    written = json.loads(tiny_model(family, torch.float32).config.to_json_string(use_diff=False))
    assert list(problems(written, architecture_of(written["model_type"]).strict)) == []


def test_what_no_class_declares_reaches_no_model(model):
    own = {
        "to_dict": 5,
        "sub_configs": {"a": 1},
        "get_text_config": None,
        "output_attentions": True,
    }
    edit_config(model, **own, is_encoder_decoder=True, sliding_window=16, id2label={"x": 1})
    config = read_config(model)
    built = build_on_meta(config, torch.float32, model / "config.json")
    assert callable(built.config.to_dict)
    assert not built.config.is_encoder_decoder
    assert getattr(built.config, "sliding_window", None) is None  # llama has none


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 64, "head_dim": None}, "64 heads of 1 elements"),
        ({"head_dim": 5}, "even rotary dimension"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e-320}}, "is not finite"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 7,
                    "original_max_position_embeddings": 64,
                },
                "rope_parameters": None,
            },
            "long_factor has 7 numbers for 8 rotary frequencies",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_when_the_model_is_built(model, changes, said):
    edit_config(model, **changes)
    with refused(ModelError, "describes no model", said, directory=model, seconds=10):
        build_on_meta(read_config(model), torch.float32, model / "config.json")


def test_every_field_of_rope_and_model_says_what_is_allowed():
    for field in (*MODEL_FIELDS.values(), *ROPE_FIELDS.values()):
        assert field.allowed
        assert not field.accepts(object())
        assert not field.accepts("\0")

"""Laws of text decoders inside multimodal checkpoints that transformers' own classes saved."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
import transformers
from families import edit_config, edit_weights, refused, relative_error, token_ids
from fp8_files import FORMS, quantized
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING
from wrappers import TEXT, WRAPPERS, save_wrapped

from qlora_kit.base.checks import read_base, read_config_file
from qlora_kit.base.config_only import open_shape
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.base.source import Source
from qlora_kit.base.text_decoder import TEXT_TYPES, is_tower, text_config
from qlora_kit.base.towers import multimodal_class
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import ModelError, UnsafeInputError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every wrapper's directory, and transformers' model that was saved into it."""
    root = tmp_path_factory.mktemp("wrapped")
    return {name: (root / name, save_wrapped(root / name, name)) for name in WRAPPERS}


@pytest.fixture
def mistral3(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["mistral3"][0], tmp_path / "model")


def options(directory, bits=16):
    return BaseConfig(str(directory), bits=bits, dtype="fp32", device="cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_decoder_alone_has_the_wrappers_logits(checkpoints, name):
    directory, wrapper = checkpoints[name]
    base = load_base(str(directory), bits=16, dtype="fp32", device="cpu")
    assert relative_error(logits(base.model), logits(wrapper)) <= 1e-5
    # Nothing of a tower is there, and what stays on the disk is said in bytes.
    stored = load_file(directory / WEIGHTS)
    left = {key: tensor for key, tensor in stored.items() if is_tower(key)}
    assert left
    assert base.wrapper.left.keys() == left.keys()
    size = sum(tensor.nbytes for tensor in left.values())
    assert any(f"{size:,} bytes" in note for note in base.notes)
    decoder = wrapper.get_submodule(base.wrapper.decoder)
    names = {f"model.{key}" for key in decoder.state_dict()} | {"lm_head.weight"}
    assert set(base.model.state_dict()) == names
    assert len(base.entries) + len(left) == len(stored)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_config_alone_gives_the_shapes_of_the_files(checkpoints, name, tmp_path):
    directory, _ = checkpoints[name]
    shutil.copy(directory / "config.json", tmp_path / "config.json")
    cpu = torch.device("cpu")
    alone = open_shape(options(tmp_path / "config.json"), cpu)
    whole = open_shape(options(directory), cpu)
    assert {name: entry.shape for name, entry in alone.entries.items()} == {
        name: entry.shape for name, entry in whole.entries.items()
    }


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_tower_tensor_that_is_missing_is_named(checkpoints, name, tmp_path):
    directory, _ = checkpoints[name]
    model = shutil.copytree(directory, tmp_path / "model")
    towers = sorted(key for key in load_file(model / WEIGHTS) if is_tower(key))
    for gone in (towers[0], towers[-1]):
        shutil.copy(directory / WEIGHTS, model / WEIGHTS)
        edit_weights(model, lambda tensors, gone=gone: tensors.pop(gone))
        with refused(ModelError, "lacks", ".".join(gone.split(".")[-2:]), directory=model):
            open_base(options(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            "lacks model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update(
                {"decoder.layers.0.up.weight": tensors.pop("language_model.model.norm.weight")}
            ),
            "holds decoder.layers.0.up.weight, neither of the text decoder",
        ),
        (
            lambda tensors: tensors.update({"extra.weight": torch.ones(3)}),
            "holds extra.weight, neither of the text decoder",
        ),
        (
            lambda tensors: tensors.update(
                {
                    "model.language_model.norm.weight": tensors.pop(
                        "language_model.model.norm.weight"
                    )
                }
            ),
            "two prefixes (model.language_model.norm.weight, language_model.model",
        ),
        (
            lambda tensors: tensors.update({"language_model.model.extra.weight": torch.ones(3)}),
            "holds model.extra.weight, which the architecture does not have",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(mistral3, change, said):
    edit_weights(mistral3, change)
    with refused(ModelError, said, directory=mistral3):
        open_base(options(mistral3))


def test_a_tensor_that_does_not_belong_is_named_at_once(mistral3):
    """`look` is what answers at once."""
    edit_weights(mistral3, lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))
    with refused(ModelError, "holds extra.weight", directory=mistral3):
        read_base(Source("model", None, mistral3))


def test_a_text_part_that_contradicts_the_files_is_refused(mistral3):
    for field, value, said in (
        ("num_hidden_layers", 3, "num_hidden_layers is 3, and the weights hold 2 layers"),
        ("hidden_size", 64, "the weights do not fit config.json"),
        ("vocab_size", 100, "embed_tokens.weight is [264, 32], expected [100, 32]"),
    ):
        config = json.loads((mistral3 / "config.json").read_text())
        edit_config(mistral3, text_config={**config["text_config"], field: value})
        with refused(ModelError, said, directory=mistral3):
            open_base(options(mistral3))
        edit_config(mistral3, **config)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"text_config": "mistral"}, ModelError, "text_config is 'mistral', not the config"),
        ({"text_config": {"hidden_size": 8}}, ModelError, "with its model_type"),
        ({"text_config": {"model_type": "m", "text_config": {}}}, ModelError, "itself wrapped"),
        ({"model_type": None}, ModelError, "has no name"),
        ({"text_config": {"model_type": "gpt2"}}, ModelError, "Conv1D"),
        ({"attn_implementation": "a/b"}, UnsafeInputError, "fetch or run"),
        ({"vision_config": {"depth": 10**9}}, ModelError, "vision_config.depth is 1000000000"),
        ({"vision_config": {"attn_implementation": "a/b"}}, UnsafeInputError, "fetch or run"),
        (
            {
                "quantization_config": {"load_in_4bit": True},
                "text_config": {
                    "model_type": "mistral",
                    "quantization_config": {"load_in_8bit": True},
                },
            },
            ModelError,
            "stands twice",
        ),
    ],
)
def test_a_wrapper_that_is_none_is_refused(mistral3, changes, error, said):
    edit_config(mistral3, **changes)
    with refused(error, said, directory=mistral3):
        open_base(options(mistral3))


@pytest.mark.parametrize(
    ("text", "said"),
    [({"model_type": "granite", "logits_scaling": 4.0}, "scale 0.25"), (None, "soft cap 3.0")],
)
def test_a_class_with_other_logits_than_its_text_model_is_refused(tmp_path, text, said):
    """Of the wrappers' classes those of Gemma 4 alone do behind the head what the text model does.

    The first line shows that the upstream class does not.
    """
    name = "llava" if text else "gemma3"
    wrapper = save_wrapped(tmp_path, name, **(text or {"final_logit_softcapping": 3.0}))
    hidden = wrapper.model(input_ids=token_ids()).last_hidden_state
    assert torch.equal(wrapper.lm_head(hidden), logits(wrapper))
    with refused(ModelError, said, "the class of", directory=tmp_path):
        open_base(options(tmp_path))


def test_a_wrapper_that_transformers_does_not_know_is_refused(mistral3):
    edit_config(mistral3, model_type="no_such_model")
    with refused(ModelError, "no multimodal model of model_type", directory=mistral3):
        open_base(options(mistral3))


def test_what_stands_outside_the_text_part_is_the_decoders(tmp_path):
    """Its own word counts for sizes, the wrapper's for tied heads and tokens."""
    whole = {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", "vocab_size": 9, "tie_word_embeddings": False},
        "vision_config": {},
        "vocab_size": 8,
        "tie_word_embeddings": True,
        "eos_token_id": 3,
        "dtype": "float16",
    }
    path = tmp_path / "config.json"
    assert text_config(whole, path) == {
        "model_type": "mistral",
        "vocab_size": 9,
        "tie_word_embeddings": True,
        "eos_token_id": 3,
        "dtype": "float16",
    }


def test_a_flat_config_is_read_as_transformers_reads_it(checkpoints, tmp_path):
    """Qwen2.5-VL was published with the decoder's fields beside the tower's."""
    directory, wrapper = checkpoints["qwen2_5_vl"]
    model = shutil.copytree(directory, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    (model / "config.json").write_text(json.dumps({**text, **config}))
    base = load_base(str(model), bits=16, dtype="fp32", device="cpu")
    assert relative_error(logits(base.model), logits(wrapper)) <= 1e-5


@pytest.mark.parametrize("untied", [True, False])
def test_a_head_is_tied_where_the_files_have_none(tmp_path, untied):
    """Mistral 3 as transformers saves it: the wrapper says tied, the text part says not."""
    wrapper = save_wrapped(tmp_path, "mistral3")
    if untied:
        head = torch.randn(264, 32, generator=torch.Generator().manual_seed(1))
        edit_weights(
            tmp_path, lambda tensors: tensors.update({"language_model.lm_head.weight": head})
        )
        wrapper = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(wrapper.lm_head.weight, head)
    base = load_base(str(tmp_path), bits=16, dtype="fp32", device="cpu")
    assert relative_error(logits(base.model), logits(wrapper)) <= 1e-5


def test_eight_bit_floats_of_a_decoder_are_the_numbers_that_they_mean(tmp_path):
    """As Ministral 3 is published: one scale a tensor, modules by the names of the class."""
    said = {**FORMS["ministral"], "modules_to_not_convert": ["model.vision_tower", ALONE]}
    for directory in (tmp_path / "fp8", tmp_path / "numbers"):
        save_wrapped(directory, "ministral3")
        edit_weights(directory, functools.partial(to_fp8, numbers=directory.name == "numbers"))
    edit_config(tmp_path / "fp8", quantization_config=said)
    ours, numbers = (
        load_base(str(tmp_path / name), bits=4, dtype="fp32", device="cpu")
        for name in ("fp8", "numbers")
    )
    assert torch.equal(logits(ours.model), logits(numbers.model))
    whole = json.loads((tmp_path / "fp8" / "config.json").read_text())
    text = text_config(whole, tmp_path / "config.json")
    assert text["quantization_config"]["modules_to_not_convert"][1] == (
        "model.layers.1.mlp.down_proj"
    )


ALONE = "model.language_model.layers.1.mlp.down_proj"


def to_fp8(tensors, *, numbers):
    for name, weight in list(tensors.items()):
        if "_proj" not in name or is_tower(name) or name.endswith("1.mlp.down_proj.weight"):
            continue
        floats, scales, suffix, meant = quantized("ministral", weight)
        if numbers:
            tensors[name] = meant.contiguous()
        else:
            owner = name.removesuffix("weight")
            tensors |= {name: floats, f"{owner}{suffix}": scales.contiguous()}


def test_a_head_that_predicts_several_tokens_stays_on_the_disk(mistral3):
    """`mtp.*`, which Qwen3.5 has, is in no class of transformers."""
    edit_weights(mistral3, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(3, 2)}))
    base = open_base(options(mistral3))
    assert "mtp.fc.weight" in base.wrapper.left
    assert any("mtp" in note for note in base.notes)


def test_a_text_model_may_have_the_prefix_of_its_class(checkpoints, tmp_path):
    """transformers reads Qwen3.5's files with the text model's config too."""
    directory, wrapper = checkpoints["qwen3_5"]
    model = shutil.copytree(directory, tmp_path / "model")
    text = json.loads((model / "config.json").read_text())["text_config"]
    (model / "config.json").write_text(json.dumps(text))
    base = load_base(str(model), bits=16, dtype="fp32", device="cpu")
    assert base.wrapper is None
    assert relative_error(logits(base.model), logits(wrapper)) <= 1e-5
    assert any("visual" in note and "stay on the disk" in note for note in base.notes)


def test_decoders_are_where_transformers_has_them():
    """For the wrappers of the tests: what adapter keys and the names of towers go by."""
    for name, settings in WRAPPERS.items():
        settings = {**settings, "text_config": {**TEXT, **settings["text_config"]}}
        kind = settings.pop("model_type")
        with torch.device("meta"):
            model = getattr(transformers, multimodal_class(kind))(CONFIG_MAPPING[kind](**settings))
        assert model.get_submodule("model.language_model").layers is not None
        for path, _ in model.named_parameters():
            inside = path.startswith(("model.language_model.", "lm_head."))
            assert is_tower(path) is not inside, (name, path)


def test_every_text_type_that_stands_for_another_is_tested(checkpoints):
    read = {
        json.loads((directory / "config.json").read_text())["text_config"]["model_type"]
        for directory, _ in checkpoints.values()
    }
    assert TEXT_TYPES.keys() - {"qwen2_vl_text"} <= read
    assert read_config_file(checkpoints["llava"][0] / "config.json")["model_type"] == "llava"

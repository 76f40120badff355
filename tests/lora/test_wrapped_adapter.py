"""Laws of adapters on multimodal checkpoints: PEFT reads ours on the class that the keys name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import randomize_adapter, refused, relative_error, token_ids
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrappers import FIRST, save_wrapped

from qlora_kit.base.load import load_base
from qlora_kit.base.text_decoder import is_tower
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.export.export import export_model
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.lora.inject import inject_lora, lora_layers
from qlora_kit.lora.names import check_keys
from qlora_kit.lora.targets import find_targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrapped")
    for name in FIRST:
        save_wrapped(root / name, name)
    return root


def load(directory):
    return load_base(str(directory), bits=16, dtype="fp32", device="cpu")


def adapted(directory, **options):
    base = load(directory)
    inject_lora(base.model, LoRAConfig(r=4, alpha=8, **options))
    randomize_adapter(base.model)
    return base


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def keys_of(directory):
    return [key.removeprefix("base_model.model.") for key in load_file(directory / WEIGHTS)]


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, "all-linear") for name in FIRST), ("mistral3", "auto")]
)
def test_peft_reads_it_on_the_multimodal_class(checkpoints, tmp_path, name, targets):
    base = adapted(checkpoints / name, target_modules=targets)
    save_adapter(base, tmp_path)
    wrapper = AutoModelForImageTextToText.from_pretrained(checkpoints / name)
    theirs = PeftModel.from_pretrained(wrapper, tmp_path).eval()
    assert relative_error(logits(base.model), logits(theirs)) <= 1e-6
    # Just the decoder's linears carry it, though towers have linears of the same short names.
    names = {key.partition(".lora_")[0] for key in keys_of(tmp_path)}
    carrying = {
        key.removeprefix("base_model.model.").partition(".lora_A")[0]
        for key in theirs.state_dict()
        if ".lora_A" in key
    }
    assert carrying == names
    assert all(key.startswith("model.language_model.") for key in names)


@pytest.mark.parametrize("name", FIRST)
def test_peft_reads_it_on_the_text_class(checkpoints, tmp_path, name):
    base = adapted(checkpoints / name, adapter_keys="text")
    save_adapter(base, tmp_path / "adapter")
    assert all(key.startswith("model.layers.") for key in keys_of(tmp_path / "adapter"))
    export_model(load(checkpoints / name), tmp_path / "text", adapter=None)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(text, tmp_path / "adapter").eval()
    assert relative_error(logits(base.model), logits(theirs)) <= 1e-6


@pytest.mark.parametrize("keys", ["wrapper", "text"])
def test_either_is_read_back_on_either_base(checkpoints, tmp_path, keys):
    base = adapted(checkpoints / "gemma3", adapter_keys=keys)
    save_adapter(base, tmp_path / "adapter")
    export_model(load(checkpoints / "gemma3"), tmp_path / "text", adapter=None)
    for directory in (checkpoints / "gemma3", tmp_path / "text"):
        other = load_adapter(load(directory), tmp_path / "adapter")
        assert torch.equal(logits(other.model), logits(base.model))
        # It is saved as it was read, where the base has both names.
        save_adapter(other, tmp_path / "again")
        wrapped = keys == "wrapper" and other.wrapper is not None
        assert keys_of(tmp_path / "again")[0].startswith("model.language_model." * wrapped)
    said = read_adapter(tmp_path / "adapter").trained_on
    assert (said["adapter_keys"], said["wrapper"]) == (keys, "gemma3")


def test_ranks_of_single_modules_keep_their_names(checkpoints, tmp_path):
    wrapper = AutoModelForImageTextToText.from_pretrained(checkpoints / "mistral3")
    config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"model\.language_model\.layers\.\d\.(self_attn\.[qv]_proj|mlp\.up_proj)",
        rank_pattern={r"language_model\.layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={"language_model.layers.0.self_attn.q_proj": 3},
    )
    theirs = get_peft_model(wrapper, config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    base = load_adapter(load(checkpoints / "mistral3"), tmp_path / "peft")
    assert relative_error(logits(base.model), logits(theirs)) <= 1e-6
    save_adapter(base, tmp_path / "ours")
    wrapper = AutoModelForImageTextToText.from_pretrained(checkpoints / "mistral3")
    again = PeftModel.from_pretrained(wrapper, tmp_path / "ours").eval()
    assert relative_error(logits(again), logits(theirs)) <= 1e-6


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
"""The kind of regex that Unsloth writes for the language layers of a multimodal model."""


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], UNSLOTH])
def test_an_adapter_of_peft_on_the_class_is_read(checkpoints, tmp_path, targets):
    """Qwen's tower has no linear of these names."""
    wrapper = AutoModelForImageTextToText.from_pretrained(checkpoints / "qwen3_5")
    theirs = get_peft_model(wrapper, PeftConfig(r=4, target_modules=targets)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    base = load_adapter(load(checkpoints / "qwen3_5"), tmp_path)
    assert relative_error(logits(base.model), logits(theirs)) <= 1e-6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*(q|patch)_proj"])
def test_an_adapter_of_a_tower_is_refused_by_name(checkpoints, tmp_path, targets):
    wrapper = AutoModelForImageTextToText.from_pretrained(checkpoints / "mistral3")
    theirs = get_peft_model(wrapper, PeftConfig(r=4, target_modules=targets))
    theirs.save_pretrained(tmp_path)
    base = load(checkpoints / "mistral3")
    with refused(AdapterError, "vision_tower", "of towers that are left out", directory=tmp_path):
        load_adapter(base, tmp_path)
    assert not lora_layers(base.model)


def test_names_under_two_prefixes_are_refused(checkpoints, tmp_path):
    base = adapted(checkpoints / "gemma3")
    save_adapter(base, tmp_path)
    rename(tmp_path, "model.language_model.layers.1.", "language_model.model.layers.1.")
    with refused(AdapterError, "two prefixes", directory=tmp_path):
        load_adapter(load(checkpoints / "gemma3"), tmp_path)


def test_the_names_of_older_classes_are_read(checkpoints, tmp_path):
    """transformers 4 had the decoder under `language_model.model`."""
    base = adapted(checkpoints / "gemma3")
    save_adapter(base, tmp_path)
    rename(tmp_path, "model.language_model.", "language_model.model.")
    other = load_adapter(load(checkpoints / "gemma3"), tmp_path)
    assert torch.equal(logits(other.model), logits(base.model))


def rename(directory, before, after):
    from families import edit_weights

    def change(tensors):
        for key in list(tensors):
            tensors[key.replace(before, after)] = tensors.pop(key)

    edit_weights(directory, change, WEIGHTS)
    config = json.loads((directory / CONFIG).read_text())
    config["target_modules"] = [name.replace(before, after) for name in config["target_modules"]]
    (directory / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "targets", ["vision_tower.q_proj", r".*vision_tower.*(q|v)_proj", r"model\.visual\..*"]
)
def test_targets_inside_a_tower_are_an_error(checkpoints, tmp_path, targets):
    model = load(checkpoints / "mistral3").model
    with refused(ConfigError, "towers", "are left out", directory=tmp_path):
        find_targets(model, targets)
    assert not any(is_tower(name) for name in find_targets(model, "all-linear"))


def test_names_of_a_class_need_one(checkpoints, bases):
    check_keys(load(checkpoints / "gemma3"), "wrapper")
    text = load(bases / "llama2")
    check_keys(text, "text")
    with pytest.raises(ConfigError, match=re.escape("llama2 is no multimodal checkpoint")):
        check_keys(text, "wrapper")

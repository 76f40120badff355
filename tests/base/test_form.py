"""Laws of the form that linears are held in: what is skipped stays, what is planned is counted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import (
    QUANTIZED,
    edit_config,
    edit_weights,
    refused,
    save_checkpoint,
    save_quantized,
    token_ids,
)
from fp8_files import save_fp8
from safetensors.torch import load_file
from trained import save_trained
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base, read_weights
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.open import open_base
from qlora_kit.base.skipped import listed_modules
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.target import processor_with
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.export.export import export_model
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.inject import lora_layers
from qlora_kit.lora.layer import Masters
from qlora_kit.lora.low_rank import delta_weight
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.plan.plan_memory import plan_memory

DOWN = "model.layers.1.mlp.down_proj"
SKIP = ["lm_head", "model.layers.1.mlp", "o_proj"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of numbers, one of 8-bit floats, and one that bitsandbytes quantized in part."""
    root = tmp_path_factory.mktemp("form")
    save_checkpoint(root / "plain", "llama_bias", torch.bfloat16)
    save_fp8(root / "blocks", "blocks")
    save_fp8(root / "ministral", "ministral")
    for kind in ("nf4_double", "int8"):
        save_quantized(root / "plain", root / kind, skip=SKIP, **QUANTIZED[kind])
    return root


def load(directory, dtype="bf16", **options):
    """On a processor that multiplies bf16, of which no note is said."""
    with processor_with(torch.bfloat16):
        return load_base(str(directory), dtype=dtype, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def unquantized(base):
    linears = decoder_linears(base.model)
    return {name for name, one in linears.items() if not isinstance(one, QuantizedLinear)}


# --skip_modules


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("skip", "ends"),
    [
        ("down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (["layers.1.mlp"], ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        (DOWN, ["1.mlp.down_proj"]),
        (r".*\.0\.self_attn\.[kv]_proj", ["0.self_attn.k_proj", "0.self_attn.v_proj"]),
    ],
)
def test_what_is_skipped_stays_as_it_is_and_nothing_else(files, bits, skip, ends):
    base, whole = (
        load(files / "plain", bits=bits, skip_modules=skip),
        load(files / "plain", bits=bits),
    )
    assert unquantized(base) == {f"model.layers.{end}" for end in ends}
    stored = load_file(files / "plain" / "model.safetensors")
    for name, linear in decoder_linears(base.model).items():
        if name in unquantized(base):
            assert torch.equal(linear.weight, stored[f"{name}.weight"])
        else:
            other = whole.model.get_submodule(name)
            assert torch.equal(
                dequantize(linear, torch.bfloat16), dequantize(other, torch.bfloat16)
            )
    assert any("by --skip_modules" in note for note in base.notes)
    assert not unquantized(whole)
    assert not whole.notes


def test_a_skip_that_matches_nothing_is_refused_with_the_linears(files):
    for skip in ("gate", "q_proj,nothing", r"layers\..*\.x", "lm_head"):
        with refused(ConfigError, "matches no linear that is quantized", "down_proj (2)",
                     directory=files / "plain"):  # fmt: skip
            load(files / "plain", skip_modules=skip)
    with refused(ConfigError, "skip_modules goes with bits 4 or 8", directory=files / "plain"):
        load(files / "plain", bits=16, skip_modules="down_proj")


def test_a_quantized_checkpoint_is_not_skipped_in(files):
    with refused(ConfigError, "--skip_modules down_proj contradicts", directory=files / "int8"):
        load(files / "int8", skip_modules="down_proj")


def test_an_adapter_says_what_was_skipped(files, tmp_path):
    base = save_trained(files / "plain", tmp_path / "one", skip_modules="o_proj,down_proj")
    assert base.info.as_dict()["skip_modules"] == ["down_proj", "o_proj"]
    assert "skip_modules" not in save_trained(files / "plain", tmp_path / "two").info.as_dict()
    again = load_adapter(
        load(files / "plain", skip_modules=["down_proj", "o_proj"]), tmp_path / "one"
    )
    assert set(lora_layers(again.model)) == set(lora_layers(base.model))


# Checkpoints that bitsandbytes quantized in part


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_linears_that_bitsandbytes_left_are_read_kept_and_said(files, kind):
    base = load(files / kind)
    expected = {
        name for name in decoder_linears(base.model) if ".1.mlp" in name or "o_proj" in name
    }
    assert unquantized(base) == expected == base.form.skipped
    stored = load_file(files / kind / "model.safetensors")
    for name in expected:
        assert torch.equal(base.model.get_parameter(f"{name}.weight"), stored[f"{name}.weight"])
    [note] = base.notes
    assert note.startswith("5 linears are not quantized, as the files have them: o_proj (2), ")


def test_the_files_decide_against_config_json_and_say_so(files, tmp_path):
    directory = shutil.copytree(files / "nf4_double", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    config["llm_int8_skip_modules"] = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.0.mlp.up_proj",
    ]
    edit_config(directory, quantization_config=config)
    base = load(directory)
    assert base.form.skipped == load(files / "nf4_double").form.skipped
    assert [note.partition(" of config.json ")[2] for note in base.notes[1:]] == [
        "lists model.layers.0.mlp.up_proj, which the files hold quantized: the files decide",
        "does not list model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj, which the "
        "files hold in 16 bits: the files decide",
    ]


def test_an_adapter_sits_on_what_was_left(files, tmp_path):
    base = save_trained(files / "nf4_double", tmp_path / "adapter", dtype="fp32")
    assert DOWN in lora_layers(base.model)
    again = load_adapter(load(files / "nf4_double", "fp32"), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(base.model))


@pytest.mark.parametrize(
    ("listed", "name", "is_it"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("language_model.model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.language_model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.vision_tower.layers.1.mlp", "model.layers.1.mlp.up_proj", False),
        ("up_proj", "model.layers.1.mlp.up_proj", True),
        ("", "model.layers.1.mlp.up_proj", False),
        ("(a+)+$", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_names_of_a_config_are_texts(listed, name, is_it):
    assert (name in listed_modules([listed], [name])) is is_it


# The plan


FORMS = {
    "plain": ("plain", {"skip_modules": "down_proj"}),
    "plain_8": ("plain", {"bits": 8, "skip_modules": "layers.0"}),
    "blocks": ("blocks/fp8", {}),
    "blocks_16": ("blocks/fp8", {"bits": 16}),
    "blocks_skipped": ("blocks/fp8", {"bits": 8, "skip_modules": "o_proj"}),
    "ministral": ("ministral/fp8", {}),
    "nf4": ("nf4_double", {}),
    "int8": ("int8", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_loading_takes_what_is_planned(files, tmp_path, form):
    """Held bytes from headers and from config.json alone; from headers the peak of loading too."""
    directory, options = FORMS[form]
    config = BaseConfig(str(files / directory), dtype="bf16", device="cpu", **options)
    counter = StorageCounter()
    counter.filling = "loading"
    base = open_base(config)
    with counter:
        counter.at("load")
        read_weights(base, counter.tag)
    held = counter.intervals[-1].end
    lora, training = LoRAConfig(r=2), TrainingConfig(gradient_checkpointing="none")
    plan = plan_memory(config, lora, training, length=16)
    shutil.copy(files / directory / "config.json", tmp_path / "config.json")
    alone = BaseConfig(str(tmp_path / "config.json"), dtype="bf16", device="cpu", **options)
    bare = plan_memory(alone, lora, training, length=16)
    for component in ("weights_quantized", "weights_other"):
        assert plan.bytes[component] == bare.bytes[component] == held.get(component, 0)
    if not base.form.stored:
        peak = max(one.peak for one in counter.intervals if one.phase == "load")
        assert plan.phases["load"] == peak


# Export


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_an_adapter_on_8_bit_floats_is_exported_as_a_plain_model(files, tmp_path, merge_base):
    base = save_trained(files / "blocks" / "fp8", tmp_path / "adapter", dtype="fp32")
    export_model(base, tmp_path / "out", merge_base=merge_base)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    numbers = load(files / "blocks" / "fp8", "fp32", bits=16).model
    for name, layer in lora_layers(base.model).items():
        held = dequantize(layer.base_layer, torch.float32)
        update = delta_weight(Masters("default").part(layer))
        before = numbers.get_submodule(name).weight if merge_base == "original" else held
        assert torch.equal(exported[f"{name}.weight"], before + update)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    if merge_base == "dequantized":
        torch.testing.assert_close(logits(plain), logits(base.model), rtol=1e-4, atol=1e-4)


# Files in other forms


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-Q4_K_M.gguf"])
def test_weights_in_another_form_are_left_alone_or_refused_by_name(files, tmp_path, name):
    directory = shutil.copytree(files / "plain", tmp_path / "model")
    (directory / name).write_bytes(b"whatever it is")
    (directory / "original").mkdir()
    (directory / "original" / "consolidated.00.pth").write_bytes(b"a pickle")
    base = load(directory)
    [note] = base.notes
    assert note.startswith(f"{name} is ")
    assert note.endswith("it is left alone")
    assert torch.equal(logits(base.model), logits(load(files / "plain").model))
    (directory / "model.safetensors").unlink()
    with refused(ModelError, name, "which is not read", directory=directory):
        load(directory)
    (directory / "config.json").unlink()
    with refused(ModelError, name, "which is not read", directory=directory):
        load(directory)


def test_a_checkpoint_that_lost_its_scales_is_refused_by_the_plan_too(files, tmp_path):
    directory = shutil.copytree(files / "blocks" / "fp8", tmp_path / "model")
    edit_weights(directory, lambda tensors: tensors.pop(f"{DOWN}.weight_scale_inv"))
    with refused(ModelError, f"{DOWN}.weight is F8_E4M3 and lacks", directory=directory):
        plan_memory(BaseConfig(str(directory)), length=16)

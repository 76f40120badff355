"""Families without a record: found out from what transformers builds, or refused by name."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import pytest
import torch
from any_model import random_model, save_random, tiny_config
from families import edit_config, edit_weights, randomize_adapter, relative_error, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base import architecture
from qlora_kit.base.decoder import decoder_layers, hidden_states, only_layers
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.base.recurrence import check_packing
from qlora_kit.base.skipped import large_others
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import ConfigError, ModelError, UnsafeInputError, error_line
from qlora_kit.export.export import export_model
from qlora_kit.lora.inject import inject_lora
from qlora_kit.lora.targets import auto_note, find_targets
from qlora_kit.options.checks import size_text

UNLIKE = ("gpt_neox", "opt", "falcon", "bloom", "cohere")
"""A fused projection, learned positions, parallel halves, ALiBi, a factor behind the head."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("generic")
    for kind in UNLIKE:
        save_random(root / kind, kind)
    return root


def load(directory, bits=16):
    return load_base(str(directory), bits=bits, dtype="fp32", device="cpu")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(2, 20), use_cache=False).logits


def reference(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", UNLIKE)
def test_logits_and_exports_are_those_of_transformers(bases, tmp_path, kind):
    theirs = reference(bases / kind)
    # How attention is computed is not the same code everywhere: sums in another order.
    assert relative_error(logits(load(bases / kind).model), logits(theirs)) <= 1e-5
    base = load(bases / kind, bits=4)
    assert any(isinstance(one, QuantizedLinear) for one in base.model.modules())
    ours = inject_lora(base.model, LoRAConfig(r=2))
    randomize_adapter(ours, scale=0.05)
    export_model(base, tmp_path / "export")
    assert relative_error(logits(reference(tmp_path / "export")), logits(ours)) <= 1e-5


def test_names_of_other_times_are_read(bases, tmp_path):
    """BLOOM was published without what the class around it calls it, tables of masks beside it."""
    old = tmp_path / "old"
    shutil.copytree(bases / "bloom", old)
    renamed = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(old / "model.safetensors").items()
    }
    edit_weights(old, lambda tensors: (tensors.clear(), tensors.update(renamed)))
    assert "word_embeddings.weight" in load_file(old / "model.safetensors")
    assert torch.equal(logits(load(old).model), logits(load(bases / "bloom").model))


def test_a_name_that_nothing_makes_fit_is_refused(bases, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bases / "opt", other)
    edit_weights(other, lambda tensors: tensors.update(stray=torch.zeros(3)))
    with pytest.raises(ModelError, match="holds stray, which the architecture does not have"):
        open_base(BaseConfig(str(other)))


@pytest.mark.parametrize("kind", UNLIKE)
def test_auto_targets_are_the_projections_of_queries_and_values(bases, kind):
    model = open_base(BaseConfig(str(bases / kind))).model
    found = {name.rpartition(".")[2] for name in find_targets(model, "auto")}
    fused = kind in ("gpt_neox", "falcon", "bloom")
    assert found == ({"query_key_value"} if fused else {"q_proj", "v_proj"})


@pytest.mark.parametrize("kind", UNLIKE)
def test_packs_are_refused_where_rows_of_one_are_not_kept_apart(bases, kind):
    model = load(bases / kind).model.eval()
    ids, positions = token_ids(2, 10), torch.arange(10).expand(2, 10)
    with torch.no_grad():
        alone = hidden_states(model, ids, positions)
        packed = hidden_states(model, ids.view(1, 20), positions.reshape(1, 20))
    apart = relative_error(packed.view_as(alone), alone) <= 1e-5
    assert apart or kind not in ("gpt_neox", "cohere")
    with contextlib.nullcontext() if apart else pytest.raises(ConfigError, match="leave --packing"):
        check_packing(model)


@pytest.mark.parametrize("kind", ["opt", "cohere"])
def test_what_stays_in_16_bits_is_what_is_there(bases, kind):
    base = load_base(str(bases / kind), bits=4, dtype="bf16", device="cpu")
    packed = {
        id(parameter)
        for module in base.model.modules()
        if isinstance(module, QuantizedLinear)
        for parameter in module.parameters(recurse=False)
        if parameter.dtype is torch.uint8
    }
    held = {id(one): one.nbytes for one in base.model.parameters() if id(one) not in packed}
    assert base.share.count * 2 == sum(held.values())
    assert base.in_16_bits["bytes"] == sum(held.values())
    assert base.left.startswith(f"{size_text(sum(held.values()))} stay in bf16, ")
    assert base.warning is None


def test_what_is_large_beside_embedding_and_head_is_a_warning_with_names(tmp_path):
    save_random(tmp_path / "base", "mamba2")
    base = open_base(BaseConfig(str(tmp_path / "base"), bits=4, dtype="bf16", device="cpu"))
    assert re.match(r"\d\d\.\d% of the weights stay in bf16 beside embedding", base.warning)
    size = sum(p.numel() * 2 for n, p in base.model.named_parameters() if "out_proj" in n)
    assert f": out_proj {size_text(size)}, conv1d " in base.warning
    assert open_base(BaseConfig(str(tmp_path / "base"), bits=16)).warning is None


def test_small_linears_are_not_quantized_and_it_is_said(tmp_path):
    save_random(tmp_path / "base", "stablelm")
    base = load(tmp_path / "base", bits=4)
    for name, module in base.model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            assert isinstance(module, QuantizedLinear) == name.endswith("q_proj"), name
    assert any("being small" in note for note in base.notes)
    assert not any(name.endswith("k_proj") for name in find_targets(base.model, "all-linear"))


def test_a_factor_that_no_record_knows_is_refused(bases, monkeypatch):
    known = {k: v for k, v in architecture.ARCHITECTURES.items() if k != "cohere"}
    monkeypatch.setattr(architecture, "ARCHITECTURES", known)
    with pytest.raises(ModelError, match="'cohere' has more between its decoder and its logits"):
        load(bases / "cohere")


def test_auto_says_where_it_takes_every_linear(bases, tmp_path):
    save_random(tmp_path / "base", "ctrl")
    model = open_base(BaseConfig(str(tmp_path / "base"))).model
    assert find_targets(model, "auto") == find_targets(model, "all-linear")
    assert "'ctrl' has no query and value projections" in auto_note(model)
    assert auto_note(open_base(BaseConfig(str(bases / "opt"))).model) is None


def test_a_linear_that_takes_no_adapter_is_refused_by_name(tmp_path):
    save_random(tmp_path / "base", "jamba")
    model = open_base(BaseConfig(str(tmp_path / "base"))).model
    for asked in ("dt_proj", "in_proj,dt_proj", ".*dt_proj"):
        with pytest.raises(ConfigError, match="code reads the weight of dt_proj") as caught:
            find_targets(model, asked)
        assert len(error_line(caught.value).splitlines()) == 1


def test_experts_that_are_counted_and_not_built_are_no_reason(tmp_path):
    config = tiny_config("doge")
    assert config.num_experts > 1
    assert not any("expert" in name for name, _ in random_model("doge").named_modules())
    save_random(tmp_path / "base", "doge")
    assert open_base(BaseConfig(str(tmp_path / "base"))).share is not None
    edit_config(tmp_path / "base", is_moe=True)
    with pytest.raises(ModelError, match="is a mixture of experts"):
        open_base(BaseConfig(str(tmp_path / "base")))


REFUSED = {
    "bart": "is an encoder and a decoder",
    "bert": "lets tokens see those after them",
    "rembert": "its decoder gives 64 numbers a token, and its head takes",
    "rwkv": "divides its own weights",
    "trocr": "attends to the output of an encoder .*encoder_attn",
    "xlm": "in two lists of modules",
    "xmod": "config.json names no default_language",
    "dots3_note_text": "head_dim and num_key_value_heads alone may differ",
    "gpt-sw3": r"Conv1D, not as linear layers, so that \d+ bytes",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_whole_is_refused_by_name(tmp_path, kind):
    save_random(tmp_path / "base", kind)
    with pytest.raises((ModelError, UnsafeInputError), match=REFUSED[kind]):
        load(tmp_path / "base", bits=4)


def test_large_weights_that_are_no_linears_are_found():
    """As in GPT-2's layers, which no name of a family is needed to see; others have none."""
    found = large_others(random_model("gpt2"))
    assert found
    assert all("Conv1D" in name for name in found)
    assert all(not large_others(random_model(kind)) for kind in UNLIKE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ffn_dim": 2**40}, "ffn_dim is 1099511627776"),
        ({"ffn_dim": "wide"}, "ffn_dim"),
        ({"activation_function": "x" * 300}, "activation_function is"),
        ({"activation_function": "no_such"}, "describes no model that can be built"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"max_position_embeddings": 2**23}, "max_position|embed_positions"),
    ],
)
def test_fields_of_a_class_are_checked(bases, tmp_path, change, said):
    shutil.copytree(bases / "opt", tmp_path / "base")
    edit_config(tmp_path / "base", **change)
    with pytest.raises(ModelError, match=said) as caught:
        open_base(BaseConfig(str(tmp_path / "base")))
    assert len(error_line(caught.value).splitlines()) == 1


def test_dropout_that_only_the_class_has_is_off(bases):
    assert "dropout" in json.loads((bases / "opt" / "config.json").read_text())
    model = load(bases / "opt").model.train()
    assert torch.equal(model(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)


def test_layers_that_are_cut_come_back(bases):
    model = load(bases / "falcon").model
    before, layers = logits(model), list(decoder_layers(model))
    with only_layers(model, [1]):
        assert list(decoder_layers(model)) == layers[1:]
        assert not torch.equal(logits(model), before)
    assert list(decoder_layers(model)) == layers
    assert torch.equal(logits(model), before)

"""Laws of adapter files: PEFT reads ours, we read PEFT's, and what does not fit is refused."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from families import (
    FAMILIES,
    edit_config,
    edit_weights,
    randomize_adapter,
    refused,
    relative_error,
    token_ids,
    tree_hash,
)
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from pickles import Payload
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, NumericError, UnsafeInputError
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import activate, inject_lora, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    """An adapter of ours on the llama2 base, which tests copy and spoil."""
    directory = tmp_path_factory.mktemp("adapter") / "ours"
    base = with_lora(load(bases / "llama2"), LoRAConfig(r=4, alpha=8))
    randomize_adapter(base.model)
    save_adapter(base, directory)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture(scope="module")
def base(bases):
    """A base for adapters that are refused; `spotless` checks that they were."""
    return load(bases / "llama2")


@pytest.fixture
def spotless(base):
    before = logits(base)
    yield base
    assert not lora_layers(base.model)
    assert torch.equal(logits(base), before)


def load(directory, bits=16, dtype="fp32"):
    return load_base(str(directory), bits=bits, dtype=dtype, device="cpu")


def plain(directory, dtype=torch.float32):
    """transformers' own model, with attention computed as the family asks for it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def with_lora(base, *options):
    inject_lora(base.model, *options)
    return base


def logits(of):
    model = of.model if isinstance(of, Base) else of
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def same_in_a_bank(base, directory):
    """Whether the bank makes of an adapter what takes part in a base now."""
    loaded, bank = logits(base), AdapterBank(base)
    bank.add("again", directory)
    with bank.using("again"):
        return torch.equal(logits(base), loaded)


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def targets_of(family):
    return ("qkv_proj", "down_proj") if family == "phi3" else ("q_proj", "v_proj", "up_proj")


# Ours in PEFT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["auto", "all-linear"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_our_adapter_has_the_same_logits_in_peft(bases, tmp_path, family, target, use_rslora):
    config = LoRAConfig(r=4, alpha=6, target_modules=target, use_rslora=use_rslora)
    ours = with_lora(load(bases / family), config)
    randomize_adapter(ours.model, scale=0.05)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(plain(bases / family), tmp_path)
    assert relative_error(logits(ours), logits(theirs)) <= 1e-6
    assert relative_error(logits(ours), logits(plain(bases / family))) > 1e-2


@pytest.mark.parametrize("target", ["auto", "all-linear"])
def test_our_bf16_adapter_has_the_same_logits_in_peft(data_dir, tmp_path, target):
    base = data_dir / "models" / "stories260K"
    ours = with_lora(load(base, dtype="bf16"), LoRAConfig(r=4, target_modules=target))
    randomize_adapter(ours.model, scale=0.02)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(plain(base, torch.bfloat16), tmp_path)
    mine, other = logits(ours).double(), logits(theirs).double()
    assert (mine - other).norm() / other.norm() <= 1e-2


def test_keys_shapes_and_config_are_those_of_pefts_own_save(bases, tmp_path):
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": True}
    targets = ["q_proj", "v_proj"]
    theirs = get_peft_model(
        plain(bases / "llama2"),
        PeftConfig(**settings, target_modules=targets, task_type="CAUSAL_LM"),
    )
    randomize_adapter(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(load(bases / "llama2"), tmp_path / "peft")
    save_adapter(ours, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "peft"))
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )
    mine, peft = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "peft"))
    assert mine.keys() <= peft.keys()
    assert mine["base_model_name_or_path"] == str(bases / "llama2")
    for key in mine:
        value = sorted(peft[key]) if key == "target_modules" else peft[key]
        assert mine[key] == value, key


def test_the_header_says_what_the_adapter_was_trained_on(bases, saved):
    said = read_adapter(saved).trained_on
    base = load(bases / "llama2")
    assert said.pop("lora") == {"r": 4, "lora_alpha": 8, "use_rslora": False}
    assert said == base.info.as_dict()
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert set(file.metadata()) == {"format", "qlora_kit"}


# PEFT's in ours


def peft_adapter(base, directory, **settings):
    theirs = get_peft_model(plain(base), PeftConfig(r=4, lora_alpha=8, **settings)).eval()
    randomize_adapter(theirs)
    theirs.save_pretrained(directory)
    return theirs


PEFT_SETTINGS = {
    "query_value": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "regex": {"target_modules": r".*layers\.\d\.(self_attn\.[qk]|mlp\.up)_proj"},
    "whole_name": {"target_modules": ["model.layers.1.self_attn.o_proj", "gate_proj"]},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, r"0\.self_attn\.v_proj": 3},
        "alpha_pattern": {"^model.layers.0.mlp.*": 5, "o_proj": 1},
    },
    "ranks_rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one_layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers_pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "exclude_names": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclude_regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*0.*o_proj"},
    "start": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_an_adapter_of_peft_has_the_same_logits_in_ours_and_back(bases, tmp_path, case):
    base = bases / "llama2"
    theirs = peft_adapter(base, tmp_path / "peft", **PEFT_SETTINGS[case])
    ours = load_adapter(load(base), tmp_path / "peft")
    assert relative_error(logits(ours), logits(theirs)) <= 1e-6
    assert same_in_a_bank(ours, tmp_path / "peft")
    # Saved again it is the same adapter, whichever way its targets were chosen.
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(plain(base), tmp_path / "ours")
    assert relative_error(logits(again), logits(theirs)) <= 1e-6
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "peft"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    reloaded = load_adapter(load(base), tmp_path / "ours")
    assert torch.equal(logits(reloaded), logits(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_adapters_of_peft(bases, tmp_path, family):
    theirs = peft_adapter(bases / family, tmp_path, target_modules=list(targets_of(family)))
    ours = load_adapter(load(bases / family), tmp_path)
    assert relative_error(logits(ours), logits(theirs)) <= 1e-6
    assert same_in_a_bank(ours, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_saved_and_loaded_on_a_quantized_base_is_bit_equal(bases, tmp_path, bits):
    ours = with_lora(load(bases / "qwen2", bits, "bf16"), LoRAConfig(r=4))
    randomize_adapter(ours.model)
    for layer in lora_layers(ours.model).values():
        for weight in layer.weights("default"):
            weight.data = weight.data.bfloat16().float()
    save_adapter(ours, tmp_path)
    assert torch.equal(
        logits(load_adapter(load(bases / "qwen2", bits, "bf16"), tmp_path)), logits(ours)
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias True"),
    ],
)
def test_what_we_lack_of_peft_is_refused_by_name(bases, spotless, tmp_path, settings, named):
    config = PeftConfig(r=4, target_modules=["q_proj"], **settings)
    get_peft_model(plain(bases / "llama2"), config).save_pretrained(tmp_path)
    with refused(AdapterError, CONFIG, named, "not supported", directory=tmp_path):
        load_adapter(spotless, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": ...}, "peft_type None is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"from_the_future": {"x": 1}}, "from_the_future"),
        ({"use_rslora": True}, "use_rslora is True, and the weights were saved with False"),
        ({"lora_alpha": 9}, "lora_alpha is 9, and the weights were saved with 8"),
        ({"use_rslora": 3}, "use_rslora must be true or false, got 3"),
        ({"r": 0}, "r must be at least 1 and at most 65536, got 0"),
        ({"r": -4}, "r must be at least 1 and at most 65536, got -4"),
        ({"r": True}, "r must be at least 1 and at most 65536, got True"),
        ({"r": "4"}, "r must be at least 1 and at most 65536, got '4'"),
        ({"r": 5}, "r is 5, and the weights were saved with 4"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"lora_alpha": 10**400}, "lora_alpha must be above 0, got 1000"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern must map names to alphas"),
        ({"r": 10**400}, "r must be at least 1 and at most 65536, got 1000"),
        ({"lora_alpha": float("nan")}, "holds NaN, which is no finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": ["nope"]}, "'nope' matches no linear of this model"),
        ({"target_modules": ["lm_head"]}, "asks for lm_head"),
        ({"target_modules": "(q"}, "is not a regex"),
        ({"target_modules": ["q_proj"]}, "holds 4 that it does not ask for"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks 4 tensors"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must map names to ranks"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight is [4, 64], expected [2, 64]"),
        ({"rank_pattern": {"(q": 2}}, "'(q' is not a regex"),
        ({"alpha_pattern": [1]}, "alpha_pattern must map names to alphas"),
        ({"layers_to_transform": "0"}, "layers_to_transform is 0"),
        ({"layers_to_transform": [7]}, "selects no linear"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "to be a list"),
        ({"exclude_modules": 5}, "exclude_modules is 5"),
        (
            {"r": 100_000, "rank_pattern": {"q_proj": 4, "v_proj": 4}},
            "r must be at least 1 and at most 65536, got 100000",
        ),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern must map names to ranks"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a name, got 5"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path must be a name"),
        ({"revision": ["main"]}, "revision must be a name, got ['main']"),
        ({"target_modules": ["q_proj"] * 20_000}, "target_modules is ['q_proj'"),
        ({"layers_to_transform": [0] * 20_000}, "layers_to_transform is [0"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [True]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_config_that_does_not_fit_is_named(spotless, adapter, changes, said):
    edit(adapter / CONFIG, **changes)
    with refused(AdapterError, said, directory=adapter):
        load_adapter(spotless, adapter)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a.b", "keys", "pop", "forward", "training", "_modules", "a\nb", None, 5],
)
def test_a_name_that_no_adapter_can_have_is_refused_before_anything_is_read(spotless, name):
    for use in (lambda: load_adapter(spotless, "nowhere", name), lambda: inject(spotless, name)):
        with pytest.raises(AdapterError, match="cannot be the name of an adapter; give letters"):
            use()


def inject(base, name):
    inject_lora(base.model, LoRAConfig(r=2), adapter=name)


def test_any_other_name_can_be_loaded_switched_to_and_saved(bases, adapter, tmp_path):
    base = load(bases / "llama2")
    for name in ("default", "my-adapter_2", "Größe", "a b", "q_proj"):
        load_adapter(base, adapter, name)
        save_adapter(base, tmp_path / name, name)
        assert load_file(tmp_path / name / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()


# Files


def test_missing_and_broken_files_are_named(spotless, adapter, tmp_path):
    with refused(AdapterError, "no such directory", directory=tmp_path):
        load_adapter(spotless, tmp_path / "nowhere")
    config = (adapter / CONFIG).read_bytes()
    (adapter / CONFIG).write_bytes(config[:100])
    with refused(AdapterError, f"{CONFIG}:4: not JSON", directory=adapter):
        load_adapter(spotless, adapter)
    (adapter / CONFIG).unlink()
    with refused(AdapterError, f"holds no {CONFIG}", directory=adapter):
        load_adapter(spotless, adapter)
    (adapter / CONFIG).write_bytes(config)
    weights = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(weights[:-1])
    with refused(AdapterError, f"{WEIGHTS}: corrupt safetensors", directory=adapter):
        load_adapter(spotless, adapter)
    (adapter / WEIGHTS).unlink()
    with refused(AdapterError, f"holds no {WEIGHTS}", directory=adapter):
        load_adapter(spotless, adapter)


def test_a_pickle_is_not_opened(spotless, adapter, tmp_path):
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    with refused(UnsafeInputError, "adapter_model.bin", "convert it", directory=adapter):
        load_adapter(spotless, adapter)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "config.yaml", "chat_template.jinja"])
def test_a_link_to_nothing_is_a_broken_adapter_and_not_one_without_the_file(
    spotless, adapter, name
):
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to("nowhere")
    with refused(AdapterError, f"{name}: is a link to nowhere", directory=adapter):
        load_adapter(spotless, adapter)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_the_directory_is_not_followed(spotless, adapter, tmp_path, name):
    (adapter / name).rename(tmp_path / "outside")
    (adapter / name).symlink_to(tmp_path / "outside")
    with refused(UnsafeInputError, name, directory=adapter):
        load_adapter(spotless, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(spotless, adapter, value):
    def spoil(tensors):
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][2, 1] = value

    edit_adapter(adapter, spoil)
    with refused(NumericError, "1.self_attn.q_proj.lora_B.weight holds 1", directory=adapter):
        load_adapter(spotless, adapter)


def edit_adapter(directory, change):
    """As `edit_weights`, which leaves the header out: PEFT's own files have none."""
    edit_weights(directory, change, WEIGHTS)


def test_surplus_tensors_and_other_dtypes_are_refused(spotless, adapter):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(adapter, lambda t: t.update({key: t[key].double()}))
    with refused(AdapterError, "holds torch.float32, torch.float64", directory=adapter):
        load_adapter(spotless, adapter)
    edit_adapter(adapter, lambda t: t.update({key: t[key].float(), "x.weight": t[key]}))
    with refused(AdapterError, "holds 1 that it does not ask for (x.weight", directory=adapter):
        load_adapter(spotless, adapter)


def test_an_adapter_of_zeros_is_warned_of(bases, tmp_path):
    save_adapter(with_lora(load(bases / "llama2")), tmp_path)
    with pytest.warns(UserWarning, match="every lora_B is zero: the adapter has no effect"):
        load_adapter(load(bases / "llama2"), tmp_path)


def test_an_adapter_that_is_not_finite_is_not_saved(bases, tmp_path):
    base = with_lora(load(bases / "llama2"))
    save_adapter(base, tmp_path)
    before = tree_hash(tmp_path)
    next(iter(lora_layers(base.model).values())).weights("default")[1].data[0, 0] = float("nan")
    with refused(NumericError, "lora_B.weight holds 1", directory=tmp_path):
        save_adapter(base, tmp_path)
    assert tree_hash(tmp_path) == before
    with refused(AdapterError, "no adapter 'other'", directory=tmp_path):
        save_adapter(base, tmp_path / "other", "other")


# Bases


def test_another_base_of_the_same_shape_is_refused_unless_allowed(bases, adapter, tmp_path):
    other = shutil.copytree(bases / "llama2", tmp_path / "other")

    def nudge(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1

    edit_weights(other, nudge)
    base = load(other)
    with refused(
        AdapterError, "was trained on llama2 with other weights than other", directory=adapter
    ):
        load_adapter(base, adapter)
    assert not lora_layers(base.model)
    load_adapter(base, adapter, allow_other_base=True)
    assert lora_layers(base.model)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("llama3", "lora_B.weight is [64, 4], expected [32, 4]"),  # fewer heads of values
        ("deep", "lacks 4 tensors"),
        ("phi3", "matches no linear of this model"),
    ],
)
def test_a_base_of_another_shape_is_refused_even_if_allowed(bases, adapter, base, said):
    with refused(AdapterError, "other weights than", directory=adapter):
        load_adapter(load(bases / base), adapter)
    with refused(AdapterError, said, directory=adapter):
        load_adapter(load(bases / base), adapter, allow_other_base=True)


def test_fewer_layers_are_refused(bases, tmp_path):
    base = with_lora(load(bases / "deep"))
    save_adapter(base, tmp_path)
    with refused(AdapterError, "holds 4 that it does not ask for", directory=tmp_path):
        load_adapter(load(bases / "llama2"), tmp_path, allow_other_base=True)


def test_a_base_in_other_bits_is_the_same_base(bases, adapter):
    load_adapter(load(bases / "llama2", bits=4, dtype="bf16"), adapter)


@pytest.mark.parametrize("said", ["{", "[1]", "3", '{"bits": "four"}', '{"fingerprint": 5}'])
def test_a_broken_header_is_named(spotless, adapter, said):
    from safetensors.torch import save_file

    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"qlora_kit": said})
    with refused(AdapterError, WEIGHTS, "qlora_kit", directory=adapter):
        load_adapter(spotless, adapter)


def test_loading_again_replaces_every_layer_of_the_old_adapter(bases, adapter, tmp_path):
    base = with_lora(load(bases / "llama2"), LoRAConfig(r=2, target_modules="all-linear"))
    randomize_adapter(base.model)
    load_adapter(base, adapter)
    fresh = load_adapter(load(bases / "llama2"), adapter)
    assert torch.equal(logits(base), logits(fresh))
    assert not any(parameter.requires_grad for parameter in fresh.model.parameters())
    activate(base.model, None)
    assert torch.equal(logits(base), logits(load(bases / "llama2")))


def test_a_renamed_base_is_still_the_same(bases, adapter, tmp_path):
    moved = shutil.copytree(bases / "llama2", tmp_path / "moved")
    edit_config(moved, transformers_version="5.0.0")
    load_adapter(load(moved), adapter)

"""Laws of adapters that other programs saved: the numbers that PEFT has, or a refusal by name.

The forms are those that are found in public files: keys with the wrappers of torch.compile, DDP,
FSDP and recomputation, with the adapter's name, with PEFT's prefix twice or not at all, and the
configs that Unsloth and axolotl leave beside them.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import randomize_adapter, refused, relative_error, token_ids
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit import AdapterBank
from qlora_kit.base.load import load_base
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter import load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model."


@pytest.fixture(scope="module")
def base(bases):
    return load_base(str(bases / "llama2"), bits=16, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(bases, tmp_path_factory):
    """An adapter that PEFT saved, and the logits that PEFT has with it."""
    directory = tmp_path_factory.mktemp("peft")
    plain = AutoModelForCausalLM.from_pretrained(bases / "llama2", dtype=torch.float32).eval()
    config = PeftConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"])
    model = get_peft_model(plain, config).eval()
    randomize_adapter(model)
    model.save_pretrained(directory)
    return directory, logits(model)


@pytest.fixture
def adapter(theirs, tmp_path):
    return shutil.copytree(theirs[0], tmp_path / "adapter")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def rename(directory, change):
    tensors = load_file(directory / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, directory / WEIGHTS)


def edit(directory, **changes):
    content = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(content))


def check(base, adapter, expected):
    """The bank and `load_adapter` open it alike, and both give PEFT's numbers."""
    bank = AdapterBank(base)
    bank.add("theirs", adapter)
    with bank.using("theirs"):
        ours = logits(base.model)
    assert relative_error(ours, expected) <= 1e-6
    load_adapter(base, adapter)
    assert torch.equal(logits(base.model), ours)
    bank.use(None)


WRAPPED = {
    "named default": lambda key: key.replace(".weight", ".default.weight"),
    "named sql": lambda key: key.replace(".weight", ".sql.weight"),
    "a name with dots": lambda key: key.replace(".weight", ".v1.2.weight"),
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile inside": lambda key: key.replace(KEY, f"{KEY}_orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "DDP of torch.compile": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: (
        "_fsdp_wrapped_module."
        + key.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn")
    ),
    "prefix twice": lambda key: KEY + key,
    "no prefix": lambda key: key.removeprefix(KEY),
    "a state dict": lambda key: key.removeprefix(KEY).replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_keys_with_more_or_less_around_them_are_the_same_adapter(base, theirs, adapter, form):
    rename(adapter, WRAPPED[form])
    check(base, adapter, theirs[1])


def unsloth_targets(names):
    """The regex that Unsloth writes in place of names, for text and multimodal models alike."""
    parts = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
    return (
        rf"(?:.*?(?:language|text).*?(?:{parts}).*?\.(?:{names}))|(?:\bmodel\.layers\.[\d]{{1,}}"
        rf"(?!.*\.experts\.\d)\..*?(?:{parts}).*?\.(?:(?:{names})))"
    )


UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "base_model_name_or_path": "unsloth/llama-2-7b-bnb-4bit",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "revision": None,
}
AXOLOTL = {
    "auto_mapping": None,
    "base_model_name_or_path": "NousResearch/Llama-2-7b-hf",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.05,
    "fan_in_fan_out": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "loftq_config": {},
}


def test_an_adapter_of_unsloth_is_what_peft_makes_of_it(base, theirs, adapter):
    edit(adapter, **UNSLOTH)
    check(base, adapter, theirs[1])
    edit(adapter, target_modules=unsloth_targets("q_proj|v_proj|o_proj"))
    check(base, adapter, theirs[1])
    edit(adapter, target_modules=unsloth_targets("q_proj|k_proj|v_proj|o_proj"))
    with refused(AdapterError, "lacks 4 tensors", directory=adapter):
        load_adapter(base, adapter)


def test_an_adapter_of_axolotl_is_what_peft_makes_of_it(base, theirs, adapter):
    edit(adapter, **AXOLOTL)
    # It lies beside the model's own files and those of the run.
    (adapter / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer_config.json", "training_args.bin", "optimizer.pt", "README.md"):
        (adapter / name).write_text("{}")
    check(base, adapter, theirs[1])
    edit(adapter, modules_to_save=["embed_tokens", "lm_head"])
    with refused(AdapterError, "modules_to_save ['embed_tokens'", directory=adapter):
        load_adapter(base, adapter)


def test_two_adapters_in_one_file_are_refused(base, adapter):
    tensors = load_file(adapter / WEIGHTS)
    both = {
        key.replace(".weight", f".{name}.weight"): tensor.clone()
        for key, tensor in tensors.items()
        for name in ("default", "sql")
    }
    save_file(both, adapter / WEIGHTS)
    with refused(AdapterError, "holds several adapters (default, sql)", directory=adapter):
        AdapterBank(base).add("theirs", adapter)
    key, first = next(iter(tensors.items()))
    save_file(tensors | {f"module.{key}": first.clone()}, adapter / WEIGHTS)
    with refused(AdapterError, f"holds {key} twice", directory=adapter):
        AdapterBank(base).add("theirs", adapter)


def test_what_is_saved_beside_the_low_rank_part_is_refused_with_what_to_do(base, adapter):
    tensors = load_file(adapter / WEIGHTS)
    full = {f"{KEY}lm_head.weight": torch.zeros(264, 64)}
    save_file(tensors | full, adapter / WEIGHTS)
    with refused(AdapterError, "lm_head.weight", "merge it with the program", directory=adapter):
        AdapterBank(base).add("theirs", adapter)
    save_file({key: torch.zeros(0) for key in tensors}, adapter / WEIGHTS)
    with refused(AdapterError, "is [0], expected", "gathered from all ranks", directory=adapter):
        AdapterBank(base).add("theirs", adapter)


def test_named_adapters_of_one_peft_model_are_in_folders_of_their_names(bases, base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(bases / "llama2", dtype=torch.float32).eval()
    model = get_peft_model(plain, PeftConfig(r=4, target_modules=["q_proj"]), "qa").eval()
    model.add_adapter("sql", PeftConfig(r=3, lora_alpha=5, target_modules=["v_proj", "down_proj"]))
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    bank = AdapterBank(base)
    with refused(AdapterError, f"give {tmp_path / 'qa'} or {tmp_path / 'sql'}", directory=tmp_path):
        bank.add("both", tmp_path)
    for name in ("qa", "sql"):
        bank.add(name, tmp_path / name)
        model.set_adapter(name)
        with bank.using(name):
            assert relative_error(logits(base.model), logits(model)) <= 1e-6

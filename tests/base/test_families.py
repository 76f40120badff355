"""Laws of the families: each is transformers' own model, and other kinds are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import (
    FAMILIES,
    edit_config,
    randomize_adapter,
    refused,
    relative_error,
    tiny_model,
    token_ids,
    tree_hash,
)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.base.meta_model import build_on_meta
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import processor_with
from qlora_kit.errors import ConfigError, ModelError, UnsafeInputError
from qlora_kit.export.export import export_model
from qlora_kit.lora.inject import inject_lora
from qlora_kit.lora.targets import find_targets
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss


def load(directory, bits=16, dtype="fp32"):
    return load_whole(directory, bits, dtype).model


def load_whole(directory, bits=16, dtype="fp32"):
    return load_base(str(directory), bits=bits, dtype=dtype, device="cpu")


def transformers_model(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        ids = token_ids() if ids is None else ids
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_are_transformers_own_model(bases, family, dtype):
    reference = transformers_model(
        bases / family, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )
    ours = load(bases / family, dtype=dtype)
    assert type(ours) is type(reference)
    # Shorter and longer than the sliding window, and than where the long rope begins.
    for length in (6, 24, 100):
        ids = token_ids(2, length)
        expected = logits(reference, ids)
        with processor_with(torch.bfloat16):
            assert torch.equal(logits(ours, ids), expected)
        # In fp32, where the processor does not multiply bf16, sums have another order.
        with processor_with():
            assert relative_error(logits(ours, ids), expected) <= {"fp32": 0, "bf16": 3e-2}[dtype]


class Drawn(TorchDispatchMode):
    """Counts the tensors into which normal numbers are drawn."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.normal_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi3", "granite4"])
def test_a_model_without_storage_draws_no_weights_and_has_its_tables(tmp_path, family):
    reference = tiny_model(family)
    reference.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with Drawn() as drawn:
        built = build_on_meta(config, torch.float32, tmp_path / "config.json")
    # torch's embeddings alone, as they are made; transformers would draw all linears again.
    assert drawn.count == sum(isinstance(one, torch.nn.Embedding) for one in built.modules())
    tables = dict(built.named_buffers())
    for name, table in reference.named_buffers():
        if not name.endswith("layer_scalar"):
            assert torch.equal(tables[name], table), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models_are_transformers_with_the_dequantized_weights(bases, family, bits):
    ours = load(bases / family, bits)
    reference = transformers_model(bases / family)
    quantized = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            quantized += 1
            reference.get_submodule(name).weight.data = dequantize(module, torch.float32)
    assert quantized == 2 * (4 if family == "phi3" else 7)
    # In 4 bits the arithmetic is the same; in 8 bits the scale is applied to the result.
    if bits == 4:
        assert torch.equal(logits(ours), logits(reference))
    assert relative_error(logits(ours), logits(reference)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_traits_of_the_family_are_in_the_checkpoint(bases, family):
    names = set(load_file(bases / family / "model.safetensors"))
    config = json.loads((bases / family / "config.json").read_text())
    layer = "model.layers.0."
    traits = {
        "llama2": config["num_key_value_heads"] == config["num_attention_heads"],
        "llama3": config["num_key_value_heads"] < 4 and "lm_head.weight" not in names,
        "llama_bias": f"{layer}mlp.down_proj.bias" in names,
        "mistral": config.get("sliding_window") == 8,
        "qwen2": f"{layer}self_attn.q_proj.bias" in names
        and f"{layer}self_attn.o_proj.bias" not in names,
        "qwen3": f"{layer}self_attn.q_norm.weight" in names,
        "gemma2": config.get("final_logit_softcapping") == 3.0
        and f"{layer}pre_feedforward_layernorm.weight" in names
        and "lm_head.weight" not in names,
        "phi3": {f"{layer}self_attn.qkv_proj.weight", f"{layer}mlp.gate_up_proj.weight"} <= names,
        "granite": all(
            config.get(f"{name}_multiplier", 1) != 1
            for name in ("embedding", "residual", "attention")
        )
        and config.get("logits_scaling", 1) != 1
        and "lm_head.weight" not in names,
    }
    assert traits[family]
    assert config["intermediate_size"] % 2 == 1


def test_gemmas_soft_cap_of_attention_is_kept(bases, tmp_path):
    # torch's fused product has no soft cap; transformers only warns when it is asked for both.
    ours = load(bases / "gemma2")
    assert ours.config._attn_implementation == "eager"
    edited = tmp_path / "uncapped"
    shutil.copytree(bases / "gemma2", edited)
    edit_config(edited, attn_logit_softcapping=1e4)
    assert relative_error(logits(load(edited)), logits(ours)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_targets_are_the_query_and_value_projections(bases, family):
    base = open_base(BaseConfig(str(bases / family)))
    found = {name.rpartition(".")[2] for name in find_targets(base.model, "auto")}
    assert found == ({"qkv_proj"} if family == "phi3" else {"q_proj", "v_proj"})


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma2", "granite"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj,lm_head", ".*(head|tokens)"])
def test_tied_heads_take_no_adapter_and_that_is_said_before_weights_are_read(bases, family, target):
    base = open_base(BaseConfig(str(bases / family)))
    with refused(ConfigError, "share one tensor", directory=bases / family):
        find_targets(base.model, target)


def batch(ids, prompt=4):
    """A batch as the loop gets it: the first `prompt` tokens of each row have no loss."""
    rows, length = ids.shape
    labels = ids.clone()
    labels[:, :prompt] = -100
    predicting = [r * length + t for r in range(rows) for t in range(prompt - 1, length - 1)]
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(length).expand(rows, length),
        "supervised": torch.tensor(predicting),
        "num_supervised": len(predicting),
        "lengths": [length] * rows,
        "packed": False,
    }


def test_keys_of_another_family_mean_nothing_to_the_loss(bases, tmp_path):
    plain, edited = bases / "llama2", tmp_path / "stray"
    shutil.copytree(plain, edited)
    edit_config(edited, final_logit_softcapping=3.0, logits_scaling=0.25)
    data = batch(token_ids(2, 20))
    with torch.no_grad():
        assert torch.equal(
            *(supervised_loss(load(directory), data) for directory in (plain, edited))
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_transformers_logits(bases, family):
    ours = inject_lora(load(bases / family), LoRAConfig(r=2, target_modules="all-linear")).train()
    randomize_adapter(ours, scale=0.05)
    data = batch(token_ids(2, 20))
    out = ours(input_ids=data["input_ids"], use_cache=False).logits[:, :-1]
    reference = torch.nn.functional.cross_entropy(
        out.reshape(-1, out.shape[-1]), data["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    reference.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    loss = supervised_loss(ours, data)
    loss.backward()
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)
    for name, gradient in expected.items():
        assert relative_error(ours.get_parameter(name).grad, gradient) <= 2e-5, name


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_layers_gives_the_same_gradients(bases, family, bits):
    ours = load(bases / family, bits, "bf16")
    inject_lora(ours, LoRAConfig(r=2, dropout=0.1, target_modules="all-linear")).train()
    randomize_adapter(ours, scale=0.05)
    data, gradients = batch(token_ids(2, 20)), []
    for level in ("none", "full"):
        set_recompute(ours, level)
        ours.zero_grad()
        loss = supervised_loss(ours, data)
        loss.backward()
        gradients.append(
            [loss.detach(), *(p.grad.clone() for p in ours.parameters() if p.requires_grad)]
        )
    assert len(gradients[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_every_name_and_loads_in_transformers(bases, tmp_path, family, bits):
    base = load_whole(bases / family, bits)
    ours = inject_lora(base.model, LoRAConfig(r=2, target_modules="all-linear"))
    randomize_adapter(ours, scale=0.05)
    export_model(base, tmp_path / "export")
    written = load_file(tmp_path / "export" / "model.safetensors")
    original = load_file(bases / family / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in original.items()}
    exported = transformers_model(tmp_path / "export")
    assert relative_error(logits(exported), logits(ours)) <= 1e-5


# What is refused


MIXTRAL_EXPERTS = 2 * 32 * 8 * 3 * 4096 * 14336
GPT2_LAYERS = 2 * 12 * 12 * 768 * 768


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("mixtral_8x7b", "'mixtral' is a mixture of experts", MIXTRAL_EXPERTS),
        ("gpt2", "'gpt2' keeps its layers as Conv1D", GPT2_LAYERS),
    ],
)
def test_real_configs_are_refused_with_the_bytes(data_dir, tmp_path, name, kind, size):
    shutil.copy(data_dir / "configs" / f"{name}.json", tmp_path / "config.json")
    with refused(ModelError, kind, f"{size} bytes", "stay unquantized", directory=tmp_path):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["llama2_7b", "llama3_1_8b", "mistral_7b", "qwen2_7b", "qwen3_8b", "gemma2_2b", "phi-3_5"],
)
def test_real_configs_of_the_families_lack_weights_only(data_dir, tmp_path, name):
    shutil.copy(data_dir / "configs" / f"{name}.json", tmp_path / "config.json")
    with refused(ModelError, "holds neither model.safetensors", directory=tmp_path):
        load(tmp_path)


OTHERS = {
    "fine_grained": (
        {
            "model_type": "qwen3_moe",
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
        },
        f"mixture of experts: .*{2 * 48 * 128 * 3 * 2048 * 768} bytes",
    ),
    "some_dense": (
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
        },
        f"mixture of experts: .*{2 * 58 * 256 * 3 * 7168 * 2048} bytes",
    ),
    "sparse_llama": ({"model_type": "llama", "num_local_experts": 4}, "mixture of experts"),
    "tower": (
        {"model_type": "git", "vision_config": {"depth": 32}},
        r"'git' has a tower .*vision_config",
    ),
    "sound": ({"model_type": "qwen2_audio", "audio_config": {"x": 1}}, "has a tower"),
    "unknown": ({"model_type": "llamma"}, "has no causal language model of model_type 'llamma'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_are_refused_from_the_config_alone(tmp_path, case):
    config, said = OTHERS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = tree_hash(tmp_path)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq", "mxfp4"])
def test_bases_of_other_quantizers_are_refused_by_name(bases, tmp_path, method):
    shutil.copytree(bases / "llama2", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with refused(ModelError, f"quantized by '{method}'", "original 16-bit", directory=tmp_path):
        load(tmp_path)


def test_phis_own_config_names_python_files_that_are_not_needed(data_dir, bases, tmp_path):
    tmp_path = tmp_path / "model"
    real = json.loads((data_dir / "configs" / "phi-3_5.json").read_text())
    shutil.copytree(bases / "phi3", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, auto_map=real["auto_map"])
    base = load_whole(tmp_path)
    assert torch.equal(logits(base.model), logits(load(bases / "phi3")))
    export_model(base, tmp_path.parent / "export", adapter=None)
    assert "auto_map" not in json.loads((tmp_path.parent / "export" / "config.json").read_text())
    (tmp_path / "modeling_phi3.py").write_text("raise SystemExit('was run')")
    with refused(UnsafeInputError, "auto_map", "without Python files", directory=tmp_path):
        load(tmp_path)

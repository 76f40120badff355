"""Laws of checkpoints of 8-bit floats: the numbers they mean, and nothing broken gets through."""

from __future__ import annotations

import shutil

import pytest
import torch
from families import edit_config, edit_weights, refused, save_checkpoint, token_ids
from fp8_files import FORMS, quantized, save_fp8
from transformers import AutoModelForCausalLM
from wrappers import save_wrapped

from qlora_kit.base.fp8_checkpoint import assume_scaled, dequantize_into, split_scaled
from qlora_kit.base.fp8_scheme import Blocks, fp8_scheme
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.load import load_base
from qlora_kit.base.safetensors_file import read_entries
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ModelError, NumericError, error_line
from qlora_kit.plan.plan_memory import plan_memory

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    for form in FORMS:
        save_fp8(root / form, form)
    return root


@pytest.fixture
def blocks(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "blocks" / "fp8", tmp_path / "model")


def load(directory, dtype="bf16", **options):
    return load_base(str(directory), dtype=dtype, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("shape", [(37, 50), (128, 64), (1, 7), (300, 129)])
@pytest.mark.parametrize(
    "sizes", [(None, None), (1, None), (16, 16), (7, 5), (128, 128), (1000, 3), (3, 1000)]
)
def test_a_value_is_multiplied_by_the_scale_of_its_block_however_many_at_a_time(shape, sizes):
    blocks, drawn = Blocks(*sizes), torch.Generator().manual_seed(0)
    grid = blocks.grid(shape)
    scales = torch.rand(grid, generator=drawn) + 0.1
    floats = torch.randn(shape, generator=drawn).to(torch.float8_e4m3fn)
    wide = scales.repeat_interleave(sizes[0] or shape[0], 0)[: shape[0]]
    wide = wide.repeat_interleave(sizes[1] or shape[1], 1)[:, : shape[1]]
    strip = shape[1] * min(sizes[0] if sizes[0] and grid[0] > 1 else 1, shape[0])
    for size in (strip, 3 * strip + 5, shape[0] * shape[1] + strip):
        out = torch.empty(shape, dtype=torch.bfloat16)
        dequantize_into(out, floats, scales, blocks, torch.empty(size))
        assert torch.equal(out, (floats.float() * wide).bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_its_logits_are_those_of_a_16_bit_checkpoint_of_the_same_numbers(checkpoints, form):
    ours, numbers = (load(checkpoints / form / kind) for kind in ("fp8", "numbers"))
    for name, module in numbers.model.named_modules():
        if isinstance(module, QuantizedLinear):
            other = ours.model.get_submodule(name).state_dict()
            for key, tensor in module.state_dict().items():
                assert torch.equal(tensor, other[key]), (name, key)
    assert torch.equal(logits(ours.model), logits(numbers.model))


@pytest.mark.parametrize("bits", [8, 16])
def test_in_8_and_16_bits_as_well(checkpoints, bits):
    ours, numbers = (load(checkpoints / "blocks" / kind, bits=bits) for kind in ("fp8", "numbers"))
    assert torch.equal(logits(ours.model), logits(numbers.model))


def test_transformers_reads_the_same_numbers(tmp_path):
    # Sizes that blocks divide: elsewhere transformers 5.23 takes the blocks to be smaller.
    save_fp8(tmp_path, "blocks", intermediate_size=160)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).eval()
    ours = load(tmp_path / "fp8", bits=16)
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_number_is_rounded_once(checkpoints, tmp_path, dtype):
    save_fp8(tmp_path, "blocks", dtype={"fp32": torch.float32, "fp16": torch.float16}[dtype])
    ours, numbers = (load(tmp_path / kind, dtype, bits=16) for kind in ("fp8", "numbers"))
    assert torch.equal(logits(ours.model), logits(numbers.model))


def test_the_fingerprint_covers_the_scales(blocks, checkpoints):
    before = load(blocks).info
    assert before.source_dtype == "bf16+float8_e4m3fn"
    edit_weights(blocks, lambda t: t[f"{UP}.weight_scale_inv"][0].mul_(2))
    assert load(blocks).info.fingerprint != before.fingerprint


def test_what_is_not_used_is_said(checkpoints):
    for form, said in {"ministral": "activation_scale", "auto": "input_scale"}.items():
        notes = load(checkpoints / form / "fp8").form.notes
        assert any(f"not used: {said}" in note for note in notes), notes
        assert any("8-bit floats: read as bf16 numbers" in note for note in notes), notes
    assert not any("not used" in note for note in load(checkpoints / "blocks" / "fp8").form.notes)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


BROKEN = {
    "no_scales": (
        drop(f"{UP}.weight_scale_inv"),
        f"{UP}.weight is F8_E4M3 and lacks {UP}.weight_scale_inv or {UP}.weight_scale",
    ),
    "both": (put(f"{UP}.weight_scale", torch.ones(())), f"has {UP}.weight_scale_inv and {UP}."),
    "short": (
        put(f"{UP}.weight_scale_inv", torch.ones(5, 4)),
        f"{UP}.weight_scale_inv is [5, 4] for [173, 64] values, expected [6, 4]",
    ),
    "turned": (
        put(f"{UP}.weight_scale_inv", torch.ones(4, 6)),
        f"{UP}.weight_scale_inv is [4, 6] for [173, 64] values, expected [6, 4]",
    ),
    "whole": (
        put(f"{UP}.weight_scale_inv", torch.ones(6, 4, dtype=torch.int32)),
        f"{UP}.weight_scale_inv is I32, expected F32",
    ),
    "no_floats": (
        put(f"{UP}.weight", torch.zeros(173, 64, dtype=torch.bfloat16)),
        f"{UP}.weight_scale_inv has no weight of 8-bit floats beside it",
    ),
    "other_floats": (
        put(f"{UP}.weight", torch.zeros(173, 64).to(torch.float8_e5m2)),
        f"{UP}.weight is [173, 64] of F8_E5M2, expected a matrix of F8_E4M3",
    ),
    "norm": (
        put("model.norm.weight", torch.zeros(64).to(torch.float8_e4m3fn)),
        "model.norm.weight is [64] of F8_E4M3, expected a matrix",
    ),
    "shape": (
        lambda t: t.update(
            {
                f"{UP}.weight": torch.zeros(64, 173).to(torch.float8_e4m3fn),
                f"{UP}.weight_scale_inv": torch.ones(2, 11),
            }
        ),
        f"{UP}.weight is [64, 173], expected [173, 64]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_scales_are_named_from_headers_alone(blocks, case):
    change, said = BROKEN[case]
    edit_weights(blocks, change)
    with refused(
        ModelError, said, "model.safetensors" if case != "shape" else "", directory=blocks
    ):
        load(blocks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(blocks, value):
    edit_weights(blocks, lambda t: t[f"{UP}.weight_scale_inv"][0].fill_(value))
    with refused(NumericError, f"{UP}.weight_scale_inv holds 4", directory=blocks):
        load(blocks)
    edit_weights(blocks, lambda t: t[f"{UP}.weight_scale_inv"].fill_(1.0))
    edit_weights(blocks, lambda t: t[f"{UP}.weight"].view(torch.uint8)[3, :5].fill_(0x7F))
    with refused(NumericError, f"{UP}.weight in bf16 holds 5", directory=blocks):
        load(blocks)


GROUP = {"targets": ["Linear"]}
UNREAD = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantized by 'awq'"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quantized by 'mxfp4'"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": GROUP | {"weights": {"num_bits": 4, "type": "int"}}},
        },
        "by 'compressed-tensors' with format 'pack-quantized'",
    ),
    "int8": (
        {
            "quant_method": "compressed-tensors",
            "format": "naive-quantized",
            "config_groups": {"a": GROUP | {"weights": {"num_bits": 8, "type": "int"}}},
        },
        "weights of a in 8 bits of 'int'",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "with sparsity_config",
    ),
    "rotated": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        "with transform_config",
    ),
    "fp4_experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "with expert_dtype 'fp4'"),
    "no_blocks": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks of [0, 128]"),
    "text": ("fp8", "quantized by 'fp8'"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_other_schemes_are_refused_by_name(blocks, case):
    said, words = UNREAD[case]
    edit_config(blocks, quantization_config=said)
    with refused(ModelError, "config.json", words, "which is not supported", directory=blocks):
        load(blocks)


ODD = (
    None,
    True,
    0,
    -1,
    2.5,
    10**400,
    "",
    "fp8",
    [],
    [1],
    [1, 2, 3],
    {},
    {"a": {}},
    [[]],
    "weight",
)


def changed(value):
    """A value with each of its fields, at any depth, replaced by odd ones, or left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {one: two for one, two in value.items() if one != key}
            for other in (*ODD, *changed(inner)):
                yield value | {key: other}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_config_says_is_read_or_refused(checkpoints, form):
    directory = checkpoints / form / "fp8"
    entries = read_entries(directory)
    shapes = {name: torch.Size(one.shape) for name, one in entries.items() if "scale" not in name}
    lines = []
    for said in changed(FORMS[form]):
        try:
            scheme = fp8_scheme({"quantization_config": said}, directory / "config.json")
            split_scaled(entries, scheme, shapes, directory)
            if scheme is not None:
                assume_scaled(entries, dict.fromkeys(("lm_head", UP)), scheme)
        except ModelError as error:
            lines.append(error_line(error))
    assert lines
    assert max(map(len, lines)) < 500


def test_a_config_and_files_that_contradict_each_other_are_named(blocks, tmp_path):
    edit_config(blocks, quantization_config=None)
    with refused(ModelError, "config.json has no quantization_config", directory=blocks):
        load(blocks)
    save_checkpoint(tmp_path / "plain", dtype=torch.bfloat16)
    edit_config(tmp_path / "plain", quantization_config=FORMS["blocks"])
    with refused(ModelError, "no tensor of the model is one", directory=tmp_path / "plain"):
        load(tmp_path / "plain")


def test_the_decoder_of_a_multimodal_checkpoint_is_read_as_well(tmp_path):
    """Ministral 3's form: one scale a tensor, one for its activations, a tower in 16 bits."""
    for kind in ("fp8", "numbers"):
        model = save_wrapped(tmp_path / kind, "ministral3").to(torch.bfloat16)
        model.save_pretrained(tmp_path / kind)

    def change(tensors, *, numbers):
        for name, weight in list(tensors.items()):
            owner = name.removesuffix(".weight")
            if "language_model" in name and ".layers." in name and weight.dim() == 2:
                floats, scales, suffix, meant = quantized("ministral", weight)
                if numbers:
                    tensors[name] = meant.bfloat16()
                    continue
                scaled = {f"{owner}.{suffix}": scales, f"{owner}.activation_scale": scales}
                tensors |= {name: floats} | {key: one.clone() for key, one in scaled.items()}

    edit_weights(tmp_path / "fp8", lambda tensors: change(tensors, numbers=False))
    edit_weights(tmp_path / "numbers", lambda tensors: change(tensors, numbers=True))
    said = {**FORMS["ministral"], "modules_to_not_convert": ["model.vision_tower", "lm_head"]}
    edit_config(tmp_path / "fp8", quantization_config=said)
    ours, numbers = (load(tmp_path / kind) for kind in ("fp8", "numbers"))
    assert len(ours.form.scaled) == 14
    assert torch.equal(logits(ours.model), logits(numbers.model))
    lora, training = LoRAConfig(r=2), TrainingConfig(gradient_checkpointing="none")
    (tmp_path / "config.json").write_bytes((tmp_path / "fp8" / "config.json").read_bytes())
    plans = [
        plan_memory(BaseConfig(str(where), dtype="bf16", device="cpu"), lora, training, length=16)
        for where in (tmp_path / "fp8", tmp_path / "config.json", tmp_path / "numbers")
    ]
    assert plans[0].bytes == plans[1].bytes == plans[2].bytes

"""Laws of checkpoints that bitsandbytes quantized: the same bytes, and nothing broken gets through.

The checkpoints are transformers' own saves of its own quantized models.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import (
    FAMILIES,
    QUANTIZED,
    edit_config,
    edit_weights,
    refused,
    relative_error,
    save_checkpoint,
    save_quantized,
    token_ids,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import processor_with
from qlora_kit.errors import ConfigError, ModelError, NumericError
from qlora_kit.export.export import export_model
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.inject import inject_lora

OPTIONS = {
    "nf4_double": {},
    "nf4": {"double_quant": False},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
}
NAME = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    save_checkpoint(root / "plain", "llama_bias", torch.bfloat16)
    for name, kind in QUANTIZED.items():
        save_quantized(root / "plain", root / name, **kind)
    return root


@pytest.fixture
def nested(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "nf4_double", tmp_path / "model")


@pytest.fixture
def rows(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "int8", tmp_path / "model")


def load(directory, dtype="bf16", **options):
    return load_whole(directory, dtype, **options).model


def load_whole(directory, dtype="bf16", **options):
    return load_base(str(directory), dtype=dtype, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_checkpoint_is_what_quantizing_here_gives(checkpoints, kind):
    stored_base = load_whole(checkpoints / kind, **OPTIONS[kind])
    made_base = load_whole(checkpoints / "plain", **OPTIONS[kind])
    stored, made = stored_base.model, made_base.model
    for name, module in made.named_modules():
        if isinstance(module, QuantizedLinear):
            other = stored.get_submodule(name)
            for key, tensor in module.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[key]), (name, key)
    assert torch.equal(logits(stored), logits(made))
    one, two = stored_base.info, made_base.info
    assert (one.bits, one.quant_type, one.double_quant) == (
        two.bits,
        two.quant_type,
        two.double_quant,
    )
    assert (one.parameters, one.source_dtype) == (two.parameters, "bf16")
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_its_logits_are_those_of_the_dequantized_model(checkpoints, kind, dtype):
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    ours = load(checkpoints / kind, dtype, **OPTIONS[kind])
    reference = AutoModelForCausalLM.from_pretrained(checkpoints / "plain", dtype=torch_dtype)
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            reference.get_submodule(name).weight.data = dequantize(module, torch_dtype)
    expected = logits(reference)
    with processor_with(torch.bfloat16):
        if kind != "int8":
            assert torch.equal(logits(ours), expected)
        # 8-bit weights are rounded to bf16 in the reference, and not in ours.
        limit = {"fp32": 1e-5, "bf16": 3e-2}[dtype]
        assert relative_error(logits(ours), expected) <= limit
    # In fp32, where the processor does not multiply bf16, sums have another order.
    with processor_with():
        assert relative_error(logits(ours), expected) <= limit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(tmp_path, family, bits):
    save_checkpoint(tmp_path / "plain", family, torch.bfloat16)
    kind = QUANTIZED["nf4_double" if bits == 4 else "int8"]
    save_quantized(tmp_path / "plain", tmp_path / "quantized", **kind)
    stored = load(tmp_path / "quantized", bits=bits)
    assert torch.equal(logits(stored), logits(load(tmp_path / "plain", bits=bits)))


def test_it_trains_exports_and_takes_its_adapter_again(checkpoints, tmp_path):
    base = load_whole(checkpoints / "nf4_double", "fp32")
    model = inject_lora(base.model, LoRAConfig(r=2))
    model.train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= 10 * parameter.grad
    model.eval()
    save_adapter(base, tmp_path / "adapter")
    again = load_adapter(load_whole(checkpoints / "nf4_double", "fp32"), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(model))
    export_model(base, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert (
        exported.config.quantization_config is None
        if hasattr(exported.config, "quantization_config")
        else True
    )
    assert relative_error(logits(exported), logits(model)) <= 1e-5


def test_linears_that_were_left_in_16_bits_stay_so(checkpoints, tmp_path):
    save_quantized(
        checkpoints / "plain", tmp_path, skip=["lm_head", "down_proj"], **QUANTIZED["nf4_double"]
    )
    model = load(tmp_path)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert isinstance(module, QuantizedLinear) is not name.endswith("down_proj")
    stored = load_file(tmp_path / "model.safetensors")
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(down), stored[down])


def test_old_int8_checkpoints_without_a_format_are_read(rows, checkpoints):
    def strip(tensors):
        for name in [n for n in tensors if n.endswith("weight_format")]:
            del tensors[name]

    edit_weights(rows, strip)
    assert torch.equal(logits(load(rows, bits=8)), logits(load(checkpoints / "int8", bits=8)))


# Conflicts


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("int8", {"bits": 4}, "--bits 4 contradicts"),
        ("int8", {"bits": 16}, "--bits 16 contradicts"),
        ("nf4", {"bits": 8}, "--bits 8 contradicts"),
        ("nf4", {"bits": 16}, "--bits 16 contradicts"),
        ("nf4", {"quant_type": "fp4"}, "--quant_type fp4 contradicts"),
        ("fp4", {"quant_type": "nf4"}, "--quant_type nf4 contradicts"),
        ("nf4", {"double_quant": True}, "--double_quant True contradicts"),
        ("int8", {"quant_type": "nf4"}, "--quant_type nf4 contradicts"),
    ],
)
def test_other_bits_or_another_format_are_a_conflict(checkpoints, kind, options, said):
    with refused(ConfigError, said, "already quantized, with", "leave --", directory=checkpoints):
        load(checkpoints / kind, **options)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_is_not_asked_for_is_taken_from_the_checkpoint(checkpoints, kind):
    info = load_whole(checkpoints / kind).info
    asked = {"bits": 4, "quant_type": "nf4", "double_quant": True} | OPTIONS[kind]
    if kind == "int8":
        asked = {"bits": 8, "quant_type": None, "double_quant": None}
    assert {key: getattr(info, key) for key in asked} == asked


# Broken states


def state_key(tensors, name=NAME):
    return next(key for key in tensors if key.startswith(f"{name}.weight.quant_state."))


def edit_state(directory, change, name=NAME):
    def apply(tensors):
        key = state_key(tensors, name)
        state = change(json.loads(bytes(tensors[key].tolist())))
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_weights(directory, apply)


def cut(suffix, count=1):
    """Take the last entries of a tensor away."""

    def apply(tensors):
        key = f"{NAME}.{suffix}"
        tensors[key] = tensors[key].view(-1)[:-count].clone()

    return apply


def drop(suffix):
    return lambda tensors: tensors.pop(f"{NAME}.{suffix}")


def put(suffix, value):
    return lambda tensors: tensors.update({f"{NAME}.{suffix}": value})


BROKEN_4BIT = {
    "packed_short": (cut("weight"), "weight holds 2047 U8, expected 2048 U8"),
    "absmax_short": (cut("weight.absmax"), "weight.absmax holds 63 U8, expected 64 U8"),
    "absmax_missing": (drop("weight.absmax"), f"lacks {NAME}.weight.absmax"),
    "absmax_float": (put("weight.absmax", torch.ones(64)), "holds 64 F32, expected 64 U8"),
    "nested_empty": (
        put("weight.nested_absmax", torch.empty(0)),
        "nested_absmax holds 0 F32, expected 1 F32",
    ),
    "nested_missing": (drop("weight.nested_absmax"), f"lacks {NAME}.weight.nested_absmax"),
    "map_short": (cut("weight.quant_map"), "quant_map holds 15 F32, expected 16 F32"),
    "nested_map_short": (
        cut("weight.nested_quant_map"),
        "nested_quant_map holds 255 F32, expected 256 F32",
    ),
    "state_missing": (lambda t: t.pop(state_key(t)), f"lacks {NAME}.weight.quant_state"),
    "state_no_json": (
        lambda t: t.update({state_key(t): torch.tensor([123, 255], dtype=torch.uint8)}),
        "is not JSON",
    ),
    "state_empty": (
        lambda t: t.update({state_key(t): torch.empty(0, dtype=torch.uint8)}),
        "is not JSON",
    ),
    "state_large": (
        lambda t: t.update({state_key(t): torch.zeros(10**6, dtype=torch.uint8)}),
        "holds 1000000 U8, expected at most 4096 U8",
    ),
    "other_kind": (
        lambda t: t.update({f"{NAME}.SCB": torch.ones(64)}),
        f"holds, against its config.json, {NAME}.SCB",
    ),
    "other_table": (
        lambda t: t[f"{NAME}.weight.quant_map"].mul_(1.01),
        "weight.quant_map is not the table of nf4",
    ),
    "other_nested_table": (
        lambda t: t[f"{NAME}.weight.nested_quant_map"].add_(0.01),
        "weight.nested_quant_map is not the table of nf4",
    ),
    "weight_missing": (drop("weight"), f"lacks {NAME}.weight"),
    "weight_dense": (
        put("weight", torch.zeros(64, 64, dtype=torch.bfloat16)),
        "weight holds 4096 BF16, expected 2048 U8",
    ),
    "all_missing": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{NAME}.weight.")],
        f"{NAME}.weight is U8, expected floating point",
    ),
    "head_quantized": (
        lambda t: t.update({"lm_head.weight.absmax": torch.ones(3)}),
        "holds lm_head.weight.absmax, which the architecture does not have",
    ),
}


@pytest.mark.parametrize("case", BROKEN_4BIT)
def test_a_broken_4_bit_state_is_named_before_bitsandbytes_sees_it(nested, case):
    change, said = BROKEN_4BIT[case]
    edit_weights(nested, change)
    with refused(ModelError, said, directory=nested):
        load(nested)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [64, 65]}, "shape is [64, 65], expected [64, 64]"),
        ({"shape": [32, 128]}, "shape is [32, 128], expected [64, 64]"),
        ({"blocksize": 128}, "blocksize is 128, expected 64"),
        ({"blocksize": 0}, "blocksize is 0, expected 64"),
        ({"quant_type": "fp4"}, "quant_type is fp4, expected nf4"),
        ({"dtype": "int32"}, "dtype is int32, expected float16 or bfloat16 or float32"),
        ({"dtype": "float16"}, "from different dtypes (bfloat16, float16)"),
        ({"nested_blocksize": 64}, "nested_blocksize is 64, expected 256"),
        ({"nested_dtype": "float64"}, "nested_dtype is float64, expected float32"),
        ({"nested_offset": "a"}, "nested_offset is a, expected a number"),
        ({"nested_offset": float("nan")}, "nested_offset is nan, expected a number"),
        ({"nested_offset": 10**400}, "nested_offset is 1000"),
    ],
)
def test_a_state_that_was_altered_is_named(nested, changes, said):
    edit_state(nested, lambda state: state | changes)
    with refused(ModelError, said, directory=nested):
        load(nested)


def test_an_offset_means_nothing_without_double_quant(checkpoints, tmp_path):
    plain = shutil.copytree(checkpoints / "nf4", tmp_path / "plain")
    edit_state(plain, lambda state: state | {"nested_offset": "a"})
    assert torch.equal(
        logits(load(plain, double_quant=False)),
        logits(load(checkpoints / "nf4", double_quant=False)),
    )


DEEP: list[object] = []
for _ in range(900):
    DEEP = [DEEP]


@pytest.mark.parametrize("content", [[], 3, None, "text", {"a": DEEP}])
def test_a_state_that_is_no_object_is_named(nested, content):
    edit_state(nested, lambda _: content)
    with refused(ModelError, f"{NAME}: quant_type is None, expected nf4", directory=nested):
        load(nested)


def test_scales_that_are_not_finite_are_named(nested, checkpoints, tmp_path):
    edit_weights(nested, lambda t: t[f"{UP}.weight.nested_absmax"].fill_(float("nan")))
    with refused(NumericError, f"{UP}.weight.nested_absmax holds 1", directory=nested):
        load(nested)
    plain = shutil.copytree(checkpoints / "nf4", tmp_path / "plain")
    edit_weights(plain, lambda t: t[f"{UP}.weight.absmax"][5:7].fill_(float("inf")))
    with refused(NumericError, f"{UP}.weight.absmax holds 2", directory=plain):
        load(plain)


BROKEN_8BIT = {
    "scales_short": (cut("SCB"), "SCB holds 63 F32, expected 64 F32"),
    "scales_missing": (drop("SCB"), f"lacks {NAME}.SCB"),
    "rows_short": (cut("weight", 64), "weight holds 4032 I8, expected 4096 I8"),
    "unsigned": (
        put("weight", torch.zeros(64, 64, dtype=torch.uint8)),
        "weight holds 4096 U8, expected 4096 I8",
    ),
    "tiled": (
        put("weight_format", torch.tensor(2, dtype=torch.uint8)),
        "weight_format is not 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN_8BIT)
def test_a_broken_8_bit_state_is_named(rows, case):
    change, said = BROKEN_8BIT[case]
    edit_weights(rows, change)
    with refused(ModelError, said, directory=rows):
        load(rows, bits=8)


def test_8_bit_scales_that_are_not_finite_are_named(rows):
    edit_weights(rows, lambda t: t[f"{UP}.SCB"][:3].fill_(float("nan")))
    with refused(NumericError, f"{UP}.SCB holds 3", directory=rows):
        load(rows, bits=8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_in_4bit": False}, "asks for neither 4 nor 8 bits"),
        ({"load_in_8bit": True}, "or for both"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "in storage 'bfloat16' is not supported"),
        ({"quant_method": "gptq"}, "quantized by 'gptq'"),
        ({"quant_method": ["bitsandbytes"]}, "which is not supported"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type ['nf4']"),
        ({"bnb_4bit_use_double_quant": False}, "holds, against its config.json,"),
    ],
)
def test_a_quantization_config_that_does_not_fit_is_named(nested, changes, said):
    config = json.loads((nested / "config.json").read_text())["quantization_config"]
    edit_config(nested, quantization_config=config | changes)
    with refused(ModelError, said, directory=nested):
        load(nested)


def test_a_config_that_promises_what_the_weights_are_not_is_named(checkpoints, nested, tmp_path):
    plain = shutil.copytree(checkpoints / "plain", tmp_path / "plain")
    quantized = json.loads((nested / "config.json").read_text())["quantization_config"]
    edit_config(plain, quantization_config=quantized)
    with refused(ModelError, "says 4 bits, and no tensor is quantized", directory=plain):
        load(plain)
    edit_config(nested, quantization_config=None)
    with refused(ModelError, "holds 70 tensors", directory=nested):
        load(nested)

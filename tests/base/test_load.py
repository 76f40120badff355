"""Laws of loading: what transformers has, whatever the files look like, and nothing mapped."""

from __future__ import annotations

import math
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from families import (
    edit_config,
    edit_weights,
    refused,
    relative_error,
    save_checkpoint,
    save_tokenizer,
    token_ids,
    tree_hash,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base.linear import dequantize
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.base.safetensors_file import fingerprint, read_entries
from qlora_kit.base.tensors import read_tensors
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.target import processor_with
from qlora_kit.errors import ModelError, NumericError, ResourceError, TokenizerError
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import StorageCounter

KINDS = {
    "plain": ("llama2", {}),
    "grouped_tied": ("llama3", {}),
    "biases": ("llama_bias", {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (family, changes) in KINDS.items():
        save_checkpoint(root / name, family, torch.bfloat16, **changes)
    return root


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "plain", tmp_path / "model")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def load(directory, bits=16, dtype="fp32", **options):
    return load_whole(directory, bits, dtype, **options).model


def load_whole(directory, bits=16, dtype="fp32", **options):
    return load_base(str(directory), bits=bits, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_transformers_own_model(checkpoints, kind, dtype):
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference = AutoModelForCausalLM.from_pretrained(checkpoints / kind, dtype=torch_dtype)
    with processor_with(torch.bfloat16):  # without, ours multiplies in fp32, and rounds less
        ours = load(checkpoints / kind, dtype=dtype)
        found = logits(ours)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    # Matrices keep the dtype of the files, which loses nothing.
    assert {p.dtype for p in ours.parameters()} == {torch_dtype, torch.bfloat16}
    assert torch.equal(found, logits(reference))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "quant_type", "double_quant", "dtype"),
    [
        (4, "nf4", True, "fp32"),
        (4, "nf4", True, "bf16"),
        (4, "nf4", False, "fp32"),
        (4, "fp4", True, "fp32"),
        (8, None, None, "fp32"),
        (8, None, None, "bf16"),
    ],
)
def test_quantized_forward_is_that_of_transformers_with_bitsandbytes(
    tmp_path, kind, bits, quant_type, double_quant, dtype
):
    # Rows that are multiples of a block: on others bitsandbytes' own forward is wrong on AVX512.
    family, changes = KINDS[kind]
    save_checkpoint(tmp_path, family, **changes, intermediate_size=192)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference = bitsandbytes_model(tmp_path, bits, torch_dtype, quant_type, double_quant)
    options = {"quant_type": quant_type, "double_quant": double_quant}
    with processor_with(torch.bfloat16):  # without, ours multiplies in fp32, and rounds less
        ours = logits(load(tmp_path, bits=bits, dtype=dtype, **options).train())
    theirs = logits(reference)
    if bits == 4:
        assert torch.equal(ours, theirs)
    elif dtype == "fp32":
        assert relative_error(ours, theirs) <= 1e-5
    else:
        # Only the order of roundings differs: less than they cost these random weights at all.
        exact = logits(load(tmp_path, bits=bits, dtype="fp32"))
        noise = (theirs.double() - exact).norm()
        assert (ours.double() - theirs.double()).norm() <= noise


def bitsandbytes_model(directory, bits, dtype, quant_type="nf4", double_quant=True):
    """transformers' own quantized model in training mode.

    Its evaluation mode repacks 4-bit weights, and rounds the activations of 8-bit layers.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type=quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(double_quant),
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=dtype
    ).train()


@pytest.mark.parametrize("bits", [4, 8])
def test_real_weights_in_bf16_are_as_near_to_transformers_as_rounding_allows(data_dir, bits):
    directory = data_dir / "models" / "stories260K"
    ours = logits(load(directory, bits, "bf16").train()).double()
    theirs = logits(bitsandbytes_model(directory, bits, torch.bfloat16)).double()
    assert (ours - theirs).norm() / theirs.norm() <= 5e-3


def test_real_weights_load_in_every_number_of_bits(data_dir):
    directory = data_dir / "models" / "stories260K"
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = token_ids()
    with torch.no_grad():
        expected = reference(ids).logits
        assert torch.equal(load(directory)(ids).logits, expected)
        # What the formats cost on trained weights: below the 0.1 (nf4) and 0.01 (int8) of a weight.
        assert relative_error(load(directory, 8)(ids).logits, expected) < 0.02
        assert relative_error(load(directory, 4)(ids).logits, expected) < 0.25


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_any_sharding_and_any_order_of_tensors_is_the_same_model(checkpoints, tmp_path, bits):
    kind = "biases"
    whole = load_whole(checkpoints / kind, bits)
    save_checkpoint(tmp_path / "shards", KINDS[kind][0], torch.bfloat16, shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    # Biases before weights: the names in reverse, in a file whose header is not sorted either.
    shutil.copytree(checkpoints / kind, tmp_path / "reversed")
    reverse_file(tmp_path / "reversed" / "model.safetensors")
    for other in ("shards", "reversed"):
        base = load_whole(tmp_path / other, bits)
        assert torch.equal(logits(base.model), logits(whole.model))
        assert base.info.fingerprint == whole.info.fingerprint


def reverse_file(path: Path) -> None:
    """Lay the tensors of a file out from last name to first."""
    import json

    entries = sorted(read_entries(path.parent).values(), key=lambda e: e.name, reverse=True)
    raw, header, data = path.read_bytes(), {}, b""
    for entry in entries:
        piece = raw[entry.start : entry.end]
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_fingerprint_changes_with_a_name_a_shape_and_a_byte(checkpoint):
    before = fingerprint(read_entries(checkpoint))

    def flip(tensors):
        tensors["model.norm.weight"][3] += 1

    edit_weights(checkpoint, flip)
    changed = fingerprint(read_entries(checkpoint))
    edit_weights(checkpoint, lambda t: t.update(other=t.pop("model.norm.weight")))
    assert len({before, changed, fingerprint(read_entries(checkpoint))}) == 3


def test_a_tied_head_that_is_stored_as_well_has_to_be_the_same(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints / "grouped_tied", tmp_path / "model")
    expected = logits(load(directory))
    edit_weights(
        directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = load(directory)
    assert torch.equal(logits(model), expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def differ(tensors):
        tensors["lm_head.weight"][5, 5] += 1

    edit_weights(directory, differ)
    with refused(ModelError, "lm_head.weight differs from", "ties it", directory=directory):
        load(directory)


def test_missing_surplus_and_misshapen_tensors_are_named_at_once(checkpoint):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        down = "model.layers.1.mlp.down_proj.weight"
        tensors[down] = tensors[down].t().contiguous()
        up = "model.layers.1.mlp.up_proj.weight"
        tensors[up] = tensors[up][:127].clone()
        norm = "model.layers.0.input_layernorm.weight"
        tensors[norm] = tensors[norm].view(64, 1)

    edit_weights(checkpoint, spoil)
    with refused(
        ModelError,
        "lacks model.norm.weight",
        "holds model.layers.0.self_attn.q_proj.bias",
        "down_proj.weight is [173, 64], expected [64, 173]",
        "up_proj.weight is [127, 64], expected [173, 64]",
        "input_layernorm.weight is [64, 1], expected [64]",
        directory=checkpoint,
        seconds=10,
    ):
        load(checkpoint)


def test_many_missing_tensors_are_counted_and_five_are_named(checkpoint):
    def strip(tensors):
        for name in [n for n in tensors if "mlp" in n]:
            tensors[name.replace("mlp", "ffn")] = tensors.pop(name)

    edit_weights(checkpoint, strip)
    with refused(ModelError, "lacks 6 tensors (", "holds 6 tensors (", directory=checkpoint):
        load(checkpoint)


@pytest.mark.parametrize("layers", [1, 3, 10**6])
def test_another_number_of_layers_is_refused_before_anything_is_built(checkpoint, layers):
    edit_config(checkpoint, num_hidden_layers=layers)
    with refused(ModelError, "num_hidden_layers is", directory=checkpoint):
        load(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [16, 4])
def test_values_that_are_not_finite_are_named_and_counted(checkpoint, bad, bits):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3:6] = bad

    edit_weights(checkpoint, spoil)
    with refused(
        NumericError,
        "model.layers.1.mlp.up_proj.weight holds 3 values that are not finite",
        directory=checkpoint,
    ):
        load(checkpoint, bits)


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 1e5), ("bf16", 3.4e38)])
def test_a_value_that_the_compute_dtype_cannot_hold_is_refused(tmp_path, dtype, value):
    save_checkpoint(tmp_path)

    def spoil(tensors):
        tensors["model.norm.weight"][1] = value

    edit_weights(tmp_path, spoil)
    with refused(NumericError, f"model.norm.weight in {dtype} holds 1", directory=tmp_path):
        load(tmp_path, dtype=dtype)


def test_large_finite_values_are_not_taken_for_infinities(checkpoint):
    def spoil(tensors):
        tensors["model.norm.weight"][:] = 3e38  # their sum overflows fp32, none of them does

    edit_weights(checkpoint, spoil)
    assert load(checkpoint).model.norm.weight.max() > 2e38


def test_integers_where_weights_belong_are_refused(checkpoint):
    edit_weights(
        checkpoint,
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
    )
    with refused(ModelError, "model.norm.weight is I64, expected floating", directory=checkpoint):
        load(checkpoint)


def test_more_tokens_than_embedding_rows_are_refused_and_fewer_are_fine(checkpoint):
    load(checkpoint)  # 260 tokens, 264 rows
    save_tokenizer(checkpoint, extra=5)
    with refused(TokenizerError, "265 tokens, 264 embedding rows", directory=checkpoint):
        load(checkpoint)


def test_a_config_of_the_wrong_kind_is_an_error_of_ours(checkpoint):
    for changes in (
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such"},
        {"head_dim": -2},
        {"rope_parameters": {"rope_type": "no_such"}},
        {"hidden_size": 10**11},
        {"head_dim": float("nan")},
    ):
        directory = shutil.copytree(checkpoint, checkpoint.parent / "other")
        edit_config(directory, **changes)
        with refused(ModelError, "config.json", directory=directory, seconds=10):
            load(directory)
        shutil.rmtree(directory)


def test_a_broken_generation_config_is_named(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"max_length": ')
    with refused(ModelError, "generation_config.json:1: not JSON", directory=checkpoint):
        load(checkpoint)


def test_no_file_is_mapped_and_the_reader_holds_one_tensor(checkpoints):
    directory = checkpoints / "plain"
    entries = read_entries(directory)
    largest = max(entry.end - entry.start for entry in entries.values())
    total = sum(entry.end - entry.start for entry in entries.values())
    for _ in read_tensors(entries):
        assert str(directory) not in Path("/proc/self/maps").read_text()
    tracemalloc.start()
    with StorageCounter(torch.nn.Module()) as counter:
        for _ in read_tensors(entries):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest <= counter.peak < largest + 64  # a sum, and whether it is finite
    assert peak < 96 * 1024 < total  # names, paths and file objects


def test_the_embedding_norms_and_head_stay_in_the_compute_dtype(checkpoints):
    model = load(checkpoints / "plain", bits=4, dtype="bf16")
    plain = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if "proj" not in name or "bias" in name
    }
    assert plain == {torch.bfloat16}


def test_loading_changes_nothing_on_disk_and_says_what_it_loaded(checkpoints):
    before = tree_hash(checkpoints)
    base = load_whole(checkpoints / "biases", bits=4, dtype="bf16")
    assert tree_hash(checkpoints) == before
    info = base.info.as_dict()
    assert info["name"] == "biases"
    assert (info["bits"], info["quant_type"], info["double_quant"]) == (4, "nf4", True)
    assert (info["source_dtype"], info["compute_dtype"]) == ("bf16", "bf16")
    stored = load_file(checkpoints / "biases" / "model.safetensors").values()
    assert info["parameters"] == sum(tensor.numel() for tensor in stored)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_tensor_that_two_modules_share_is_counted_once(bits):
    base = open_base(BaseConfig("tiny", bits=bits))
    assert base.model.config.tie_word_embeddings
    in_files = sum(math.prod(entry.shape) for entry in base.entries.values())
    assert base.info.parameters == in_files == 2_361_408
    assert base.share is None if bits == 16 else base.share.total == in_files


def test_a_device_that_is_not_there_is_a_resource_error(checkpoint):
    with refused(ResourceError, "--device cuda:99", "CUDA devices", directory=checkpoint):
        load_base(str(checkpoint), device="cuda:99")


def test_the_base_trains_without_dropout_of_its_own(checkpoint):
    edit_config(checkpoint, attention_dropout=0.5)
    model = inject_lora(load(checkpoint)).train()
    assert torch.equal(logits(model), logits(model))


def test_a_tensor_without_elements_is_refused_for_its_shape(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.empty(0)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with refused(ModelError, "model.norm.weight is [0], expected [64]", directory=checkpoint):
        load(checkpoint)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_linears_are_near_the_original(checkpoints, bits):
    stored = load_file(checkpoints / "plain" / "model.safetensors")
    model = load(checkpoints / "plain", bits=bits, dtype="fp32")
    for name, weight in stored.items():
        if "proj" in name:
            layer = model.get_submodule(name.removesuffix(".weight"))
            error = (
                dequantize(layer, torch.float32) - weight.float()
            ).norm() / weight.float().norm()
            assert error < {4: 0.12, 8: 0.012}[bits]

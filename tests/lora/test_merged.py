"""Laws of an adapter merged in memory, against itself beside its base and against an export."""

from __future__ import annotations

import gc
import hashlib
import weakref

import pytest
import torch
from families import relative_error, token_ids
from trained import save_trained, trained_base

from qlora_kit import AdapterBank
from qlora_kit.base.linear import Linear4bit, Linear8bit, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.device.found import with_room
from qlora_kit.errors import AdapterError, ConfigError, NumericError, ResourceError
from qlora_kit.export.tensors import export_tensors
from qlora_kit.lora.inject import lora_layers, switch_of
from qlora_kit.lora.merged import merge
from qlora_kit.training.layer_forward import use_fused_blocks

FP32, BF16 = 1e-5, 0.02
"""Relative logit error: sums in another order; rounding of the weights to bf16, which alone is
some 1 % where the adapter beside its base has 0.8 % of its own."""


@pytest.fixture(scope="module")
def base(bases):
    return trained_base(bases / "llama3", bits=4)


@torch.no_grad()
def logits(model):
    return model(token_ids(4, 12)).logits.float()


def fingerprint(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("bits", "dtype", "tolerance"),
    [(4, "fp32", FP32), (8, "fp32", FP32), (16, "fp32", FP32), (4, "bf16", BF16)],
)
def test_merged_in_16_bits_is_the_adapter_up_to_rounding(bases, bits, dtype, tolerance):
    base = trained_base(bases / "llama3", bits=bits, dtype=dtype)
    switch = switch_of(base.model)
    unmerged = logits(base.model)
    switch.active, adapter = None, switch.active
    alone = logits(base.model)
    before = fingerprint(base.model)
    switch.active = merge(base, adapter, 16)
    assert relative_error(logits(base.model), unmerged) <= tolerance
    assert relative_error(alone, unmerged) > 5 * tolerance
    switch.active = adapter
    assert torch.equal(logits(base.model), unmerged)
    switch.active = None
    assert torch.equal(logits(base.model), alone)
    assert fingerprint(base.model) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_copy_is_what_an_export_writes(bases, bits):
    base = trained_base(bases / "llama_bias", bits=bits, dtype="bf16", spread=0.1)
    written = {one.name: one.make().bfloat16() for one in export_tensors(base)}
    merged = merge(base, switch_of(base.model).active, 16)
    for name, layer in lora_layers(base.model).items():
        copy = merged.part(layer).base
        assert torch.equal(copy.weight, written[f"{name}.weight"])
        assert copy.bias is layer.base_layer.bias


@pytest.mark.parametrize(("bits", "kind", "step"), [(4, Linear4bit, 0.2), (8, Linear8bit, 0.02)])
def test_a_requantized_copy_is_in_the_form_of_the_base(bases, bits, kind, step):
    base = trained_base(bases / "llama3", bits=bits, skip_modules=("layers.0.mlp",))
    adapter = switch_of(base.model).active
    merged, dense = merge(base, adapter), merge(base, adapter, 16)
    for name, layer in lora_layers(base.model).items():
        copy, wanted = merged.part(layer).base, dense.part(layer).base.weight.float()
        assert isinstance(copy, kind) != name.startswith("model.layers.0.mlp")
        assert relative_error(dequantize(copy, torch.float32), wanted) < step
    assert merged.nbytes < dense.nbytes


def test_what_the_adapter_leaves_alone_is_the_base(base):
    merged = merge(base, switch_of(base.model).active, 16)
    assert set(merged.parts) == set(lora_layers(base.model).values())
    assert merged.part(torch.nn.Linear(2, 2)) is None


def test_dropping_the_reference_frees_the_copies(base):
    switch = switch_of(base.model)
    adapter = switch.active
    switch.active = merged = merge(base, adapter, 16)
    weights = [weakref.ref(part.base.weight) for part in merged.parts.values()]
    assert merged.nbytes == sum(one().nbytes for one in weights)
    logits(base.model)
    switch.active = adapter
    del merged
    gc.collect()
    assert not any(one() is not None for one in weights)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_copies_that_do_not_fit_are_refused_before_they_are_made(base, bits):
    adapter = switch_of(base.model).active
    taken = merge(base, adapter, bits).nbytes
    with (
        with_room(taken),
        pytest.raises(ResourceError, match=rf"{bits} bits takes .* are free; .*leave it unmerged"),
    ):
        merge(base, adapter, bits)
    assert switch_of(base.model).active is adapter


def test_bits_that_a_base_has_not_and_sums_that_are_no_numbers_are_refused(bases):
    base = trained_base(bases / "llama3", bits=16, dtype="fp16")
    adapter = switch_of(base.model).active
    with pytest.raises(
        ConfigError, match="merged in 4 bits, and the base is held in 16; merge it in 16"
    ):
        merge(base, adapter, 4)
    with pytest.raises(ConfigError, match="merged in 4, 8 or 16 bits, got 5"):
        merge(base, adapter, 5)
    lora_layers(base.model)["model.layers.1.mlp.up_proj"].lora_B["default"].weight.data.fill_(1e5)
    with pytest.raises(NumericError, match="float16"):
        merge(base, adapter)


def test_a_bank_uses_a_merged_adapter_by_its_name_until_it_is_unmerged(bases, tmp_path):
    save_trained(bases / "llama3", tmp_path, dtype="fp32")
    base = load_base(str(bases / "llama3"), bits=4, dtype="fp32")
    assert use_fused_blocks(base.model) is None
    bank = AdapterBank(base)
    bank.add("a", tmp_path)
    before, alone = fingerprint(base.model), logits(base.model)
    bank.use("a")
    unmerged = logits(base.model)
    merged = bank.merge("a")
    assert torch.equal(logits(base.model), unmerged)  # until it is used
    with bank.using("a"):
        assert switch_of(base.model).active is merged is bank.rows(["a", "a"])
        assert relative_error(logits(base.model), unmerged) <= FP32
        assert bank.active == "a"
    with pytest.raises(AdapterError, match="'a' is merged, and shares no batch"):
        bank.rows(["a", None])
    bank.add_sum("weaker", {"a": 0.5})
    bank.use("a")
    with bank.using(None):
        bank.unmerge("a")
    assert switch_of(base.model).active is bank.rows(["a"])
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        bank.unmerge("nobody")
    for name, wanted in ((None, alone), ("a", unmerged)):
        bank.use(name)
        assert torch.equal(logits(base.model), wanted)
    bank.merge("a")
    with pytest.raises(AdapterError, match="'a' is active"):
        bank.remove("a")
    bank.use("weaker")
    bank.remove("a")
    with pytest.raises(AdapterError, match="no adapter 'a'"):
        bank.use("a")
    assert fingerprint(base.model) == before

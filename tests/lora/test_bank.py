"""Laws of many adapters on one base: each as it is alone, and the base as it was."""

from __future__ import annotations

import hashlib

import pytest
import torch
from families import randomize_adapter, refused, relative_error, token_ids

from qlora_kit import AdapterBank
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.layer_forward import use_fused_blocks

FORMS = {
    "a": {"r": 4, "alpha": 8.0},
    "b": {"r": 2, "alpha": 3.0, "target_modules": "all-linear", "adapter_dtype": "bf16"},
    "c": {"r": 7, "target_modules": "o_proj,down_proj", "use_rslora": True},
}
"""Adapters of different ranks, targets, scalings and dtypes."""


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """The folder of one adapter of each form on the llama2 base."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, form) in enumerate(FORMS.items()):
        base = load(bases)
        inject_lora(base.model, LoRAConfig(**form), seed=number)
        randomize_adapter(base.model)
        save_adapter(base, root / name)
    return root


def load(bases, bits=16, dtype="fp32", family="llama2"):
    return load_base(str(bases / family), bits=bits, dtype=dtype, device="cpu")


def logits(base):
    with torch.no_grad():
        return base.model(input_ids=token_ids(), use_cache=False).logits


def hashed(base):
    """SHA-256 of every tensor of the base, adapters left out."""
    found = {}
    for name, tensor in base.model.state_dict().items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found[name.replace(".base_layer", "")] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_each_adapter_of_a_bank_is_what_it_is_alone_and_the_base_is_the_base(
    bases, adapters, bits, fused
):
    base = load(bases, bits)
    if fused:
        assert use_fused_blocks(base.model) is None
    alone = logits(base)
    before = hashed(base)
    bank, first = AdapterBank(base), {None: alone}
    for name in FORMS:
        bank.add(name, adapters / name)
        assert bank.active is None
        assert torch.equal(logits(base), alone)
    assert bank.names == tuple(FORMS)
    for name in FORMS:
        bank.use(name)
        first[name] = logits(base)
        separate = logits(load_adapter(load(bases, bits), adapters / name))
        assert relative_error(first[name], separate) <= 3e-5
        assert relative_error(first[name], alone) > 1e-2
    for name in ("a", "b", "a", None, "c", "b", None, "a"):
        with bank.using(name):
            assert torch.equal(logits(base), first[name])
    assert hashed(base) == before


def test_unknown_and_taken_names_are_refused(bases, adapters):
    bank = AdapterBank(load(bases))
    with pytest.raises(AdapterError, match="the bank has no adapter 'a'; it has none: add one"):
        bank.use("a")
    bank.add("a", adapters / "a")
    with refused(AdapterError, "has an adapter 'a' already", directory=adapters):
        bank.add("a", adapters / "b")
    with pytest.raises(AdapterError, match="the bank has no adapter 'b'; it has a"):
        bank.rows(["a", "b", None])
    bank.use("a")
    with pytest.raises(AdapterError, match=r"adapter 'a' is active; .*use\(None\)"):
        bank.remove("a")
    bank.use(None)
    bank.remove("a")
    assert bank.names == ()

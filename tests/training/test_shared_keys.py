"""Laws of layers that share keys and values: a replay sees those of the first forward.

Gemma 3n and 4 hand a dictionary from layer to layer. The reference is autograd without any
recompute, on transformers' own model.
"""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from adapted import adapted_model
from families import randomize_adapter, relative_error, tiny_model, token_ids
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.block_parts import SharedKeys
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.layer_forward import set_recompute

LEVELS = ("none", "selective", "full", ("full", "none", "selective", "full"))


def gradients(model, ids):
    """Of all adapters, and the outputs (B, T, h) of the decoder."""
    model.zero_grad(set_to_none=True)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    drawn = torch.Generator().manual_seed(4)
    hidden.backward(torch.randn(hidden.shape, generator=drawn).to(hidden.dtype))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **found}


def storing(model):
    """The names of the projections whose results other layers read."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if getattr(module, "store_full_length_kv", False)
        for leaf in ("k_proj", "v_proj")
        if getattr(module, leaf, None) is not None
    ]


def differences(own, family="gemma4", levels=LEVELS):
    """At each level how far each gradient is from transformers' model without recompute."""
    ids = token_ids(2, 13)
    expected = gradients(adapted_model(family, own=False, targets="all-linear"), ids)
    for level in levels:
        model = adapted_model(family, own=own, targets="all-linear")
        set_recompute(model, level)
        found = gradients(model, ids)
        assert found.keys() == expected.keys()
        yield {name: relative_error(found[name], expected[name]) for name in expected}


@pytest.mark.parametrize(
    ("family", "own"), [("gemma4", False), ("gemma4", True), ("gemma3n", False)]
)
def test_gradients_go_through_shared_keys_at_every_level(family, own):
    for errors in differences(own, family):
        assert max(errors.values()) <= 1e-5


def test_gradients_are_those_of_double_precision():
    """Of the projections that are read by later layers, all paths through those included."""
    ids, results = token_ids(2, 13), []
    for dtype in (torch.float64, torch.float32):
        model = adapted_model("gemma4", dtype, own=False, targets="all-linear")
        if dtype is torch.float32:
            set_recompute(model, "full")
        results.append(gradients(model, ids))
    exact, found = results
    names = [n for n in exact if any(n.startswith(stored) for stored in storing(tiny()))]
    assert len(names) == 6  # A and B of keys twice and of values once
    for name in exact:
        assert relative_error(found[name], exact[name]) <= 1e-5, name


def tiny():
    return tiny_model("gemma4")


def test_an_adapter_has_the_same_logits_in_peft(base_of, tmp_path):
    """On projections whose results other layers read, and on those of the layers' embeddings."""
    base = load_base(str(base_of("gemma4")), bits=16, dtype="fp32", device="cpu")
    inject_lora(base.model, LoRAConfig(r=4, target_modules="all-linear"))
    randomize_adapter(base.model, scale=0.05)
    save_adapter(base, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base_of("gemma4"), dtype=torch.float32)
    ids = token_ids()
    with torch.no_grad():
        alone = plain(ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path)(ids).logits
        ours = base.model(ids).logits
    assert relative_error(ours, theirs) <= 1e-6
    assert relative_error(ours, alone) > 1e-2


def test_other_keys_in_a_replay_are_caught(monkeypatch):
    """What this guards against: another dictionary the second time."""

    def lost(self, again, run, shared, *args, **options):
        def inside(*args, calls, **options):
            calls.append(1)
            now = {k: tuple(torch.zeros_like(x) for x in kv) for k, kv in shared.items()}
            return run(*args, shared_kv_states=shared if len(calls) == 1 else now, **options)

        return again(functools.partial(inside, calls=[]), *args, **options)

    monkeypatch.setattr(SharedKeys, "through", lost)
    (errors,) = differences(own=False, levels=["full"])
    assert max(errors.values()) > 1e-2


@pytest.mark.parametrize("level", ["none", "selective", "full"])
@pytest.mark.parametrize("own", [False, True])
def test_a_step_that_is_given_up_is_freed_at_once(own, level):
    """No circle holds it, from a checkpoint over the dictionary to its own results."""
    model = adapted_model("gemma4", own=own, targets="all-linear")
    set_recompute(model, level)
    held = []
    model.base_model.layers[0].register_forward_hook(
        lambda module, args, output: held.append(weakref.ref(output))
    )
    gc.disable()
    try:
        hidden = model.base_model(input_ids=token_ids(1, 9), use_cache=False).last_hidden_state
        assert hidden.requires_grad
        del hidden
        assert held[0]() is None
    finally:
        gc.enable()

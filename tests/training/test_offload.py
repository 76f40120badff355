"""Laws of what lies on the host between forward and replay: the same bits, less on the device.

Copies are plain ones, or as late as they may be (`tests/support/late_copies.py`).
"""

from __future__ import annotations

import gc

import pytest
import torch
from adapted import adapted_model
from families import token_ids
from late_copies import Late

from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.memory.counter import HOST, StorageCounter
from qlora_kit.memory.profiler import follow
from qlora_kit.training.layer_forward import models_own_code, set_offload, set_recompute
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.offload import Offload

LAYERS = 4
HIDDEN = 64
MIX = ("full", "selective", "none", "full")
LEVELS = ("full", "selective", MIX, ("none", *MIX[1:3], "none"))
SOME = ("llama2", "qwen3", "gemma2", "phi3", "gemma4", "gemma3n")
"""With norms of heads, soft caps and windows, fused linears, and layers that share keys."""


def prepared(family="llama2", dtype=torch.float32, **changes):
    settings = {"num_hidden_layers": LAYERS, "bits": 4, "targets": "all-linear", **changes}
    return adapted_model(family, dtype, packed=True, **settings)


def batch_of(packed=False, length=17, seed=0):
    rows = [token_ids(1, length, seed=seed + number)[0].tolist() for number in range(4)]
    encoded = [Encoded(row, [-100, *row[1:]]) for row in rows]
    return collate_packs([encoded[:2], encoded[2:]], 0) if packed else collate(encoded, 0)


def results_of(model, *batches):
    """The losses and the accumulated gradients of some micro-batches."""
    model.zero_grad(set_to_none=True)
    losses = {}
    for place, batch in enumerate(batches):
        loss = supervised_loss(model, batch)
        loss.backward()
        losses[f"loss {place}"] = loss.detach()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**losses, **gradients}


def check(model, *batches, levels=LEVELS, copies=None):
    """Losses and gradients are the same bits with what is recomputed from on the host."""
    for level in levels:
        set_recompute(model, level)
        set_offload(model, None)
        expected = results_of(model, *batches)
        assert len(expected) > len(batches)
        set_offload(model, Offload(copies))
        found = results_of(model, *batches)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), level


EVERY_PAIR = [
    (torch.float32, False, 0.1, True),
    (torch.float32, True, 0.0, False),
    (torch.bfloat16, False, 0.1, False),
    (torch.bfloat16, True, 0.0, True),
]
"""Dtype, packed, dropout, own blocks: every pair of values is in one of them."""


@pytest.mark.parametrize(("place", "family"), [*enumerate(SOME)])
def test_numbers_are_those_without_it(place, family):
    """Of families in turn, with two micro-batches; copies are as late as they may be."""
    dtype, packed, dropout, own = EVERY_PAIR[place % len(EVERY_PAIR)]
    # The last has layers whose own code reads their weights.
    own, bits = (False, 16) if family == "gemma3n" else (own, 4)
    model = prepared(family, dtype, own=own, dropout=dropout, bits=bits)
    copies = Late()
    batches = batch_of(packed), batch_of(packed, 9, seed=5)
    check(model, *batches, levels=LEVELS[1:3], copies=copies)
    assert copies.made


@pytest.mark.parametrize(("dtype", "packed", "dropout", "own"), EVERY_PAIR)
def test_with_plain_copies_they_are_too(dtype, packed, dropout, own):
    check(prepared(dtype=dtype, own=own, dropout=dropout), batch_of(packed))


@pytest.mark.parametrize("own", [True, False])
def test_a_base_with_dropout_draws_the_same_again(own):
    model, batch = prepared(own=own, attention_dropout=0.2), batch_of()
    results = []
    for offload in (None, Offload(Late())):
        for level in ("full", "selective"):
            set_recompute(model, level)
            set_offload(model, offload)
            torch.manual_seed(5)
            results.append(results_of(model, batch))
    expected, *others = results
    for found in others:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_models_own_code_is_recomputed_from_there_too():
    with models_own_code():
        check(prepared(), batch_of(), copies=Late())


def kept(model, level, offload):
    """Bytes that forward leaves, on the device and on the host."""
    set_recompute(model, level)
    set_offload(model, offload)
    ids = token_ids(2, 32)
    positions = torch.arange(32).expand(ids.shape)
    with StorageCounter(model, apart=(HOST,)) as counter:
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        found = counter.current - counter.before, counter.sizes.get(HOST, 0)
        hidden.sum().backward()
        del hidden
        assert counter.sizes.get(HOST, 0) == 0
    return found


@pytest.mark.parametrize("own", [True, False])
def test_a_layer_more_takes_nothing_of_the_device(own):
    """2h bytes a token at `full`, and what `selective` keeps, are on the host instead."""
    row, changes = 2 * 2 * 32 * HIDDEN, {"dtype": torch.bfloat16, "own": own, "bits": 16}
    models = [prepared(num_hidden_layers=layers, **changes) for layers in (2, 3)]
    for level, rows in (("full", 1), ("selective", 3 if own else 2)):
        (without, _), (longer, _) = [kept(model, level, None) for model in models]
        a_layer = longer - without
        assert a_layer >= rows * row
        # Of all layers but the last, of which the device keeps what backward begins with.
        stays = row if own else a_layer
        for copies in (None, Late()):
            found = [kept(model, level, Offload(copies)) for model in models]
            assert [host for _, host in found] == [layers * a_layer - stays for layers in (2, 3)]
            assert [device for device, _ in found] == [without - 2 * a_layer + stays] * 2


def test_backward_finds_two_at_once():
    """The peak of a step does not grow with the number of layers, beside their gradients."""
    peaks = {}
    for offload in (True, False):
        for layers in (3, 5):
            model = prepared(dtype=torch.bfloat16, num_hidden_layers=layers, bits=16)
            set_recompute(model, "full")
            set_offload(model, Offload(Late()) if offload else None)
            batch = batch_of(length=128)
            with (
                StorageCounter(model, apart=(HOST, "gradients")) as counter,
                follow(model, counter),
            ):
                supervised_loss(model, batch).backward()
            peaks[offload, layers] = counter.peak - counter.before
    row = 2 * 4 * 128 * HIDDEN
    assert peaks[True, 5] == peaks[True, 3]
    assert peaks[False, 5] - peaks[False, 3] == 2 * row
    assert peaks[True, 5] == peaks[False, 5] - 5 * row + 2 * row


def test_a_fetch_is_asked_for_while_the_replay_before_it_runs():
    """And no more than that: a copy to the host and, in backward, one to the device."""
    copies, model = Late(), prepared()
    set_recompute(model, "full")
    set_offload(model, Offload(copies))
    loss = supervised_loss(model, batch_of())
    assert (copies.made, len(copies.waiting)) == (LAYERS - 1, 0)
    loss.backward()
    assert (copies.made, len(copies.waiting)) == (2 * (LAYERS - 1), 0)
    assert copies.most == 1


class GivenUpError(Exception):
    """A step is."""


@pytest.mark.parametrize("level", ["selective", MIX])
def test_what_a_step_that_is_given_up_held_is_gone(level):
    """In the middle of forward or of backward; the next step is as any other."""
    model, batch = prepared(dropout=0.1), batch_of()
    set_recompute(model, level)
    expected = results_of(model, batch)
    copies = Late()
    set_offload(model, Offload(copies))
    with StorageCounter(model, apart=(HOST,)) as counter:
        results_of(model, batch)  # what it makes once is no part of a step
        model.zero_grad(set_to_none=True)
        before = counter.current
        for hook in ("register_forward_hook", "register_full_backward_pre_hook"):

            def give_up(*args):
                raise GivenUpError

            handle = getattr(model.base_model.layers[2], hook)(give_up)
            with pytest.raises(GivenUpError):
                results_of(model, batch)
            handle.remove()
            model.zero_grad(set_to_none=True)
            gc.collect()  # frames of the error
            assert counter.sizes[HOST] == 0
            assert counter.current == before
            assert not copies.waiting
    found = results_of(model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_more_recompute_in_the_middle_of_a_run_changes_nothing():
    """As the guard has it: levels are set again, and what is on the host stays the same."""
    model, batch = prepared(), batch_of()
    expected = results_of(model, batch)
    set_offload(model, Offload(Late()))
    for level in (("none", "none", "full", "selective"), "full"):
        set_recompute(model, level)
        found = results_of(model, batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected), level

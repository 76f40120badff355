"""Laws of a base that is streamed: the same bits as without, whatever happens in the middle."""

from __future__ import annotations

import hashlib
import itertools
import time
from functools import partial

import pytest
import torch
from adapted import adapted_model
from families import token_ids

from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.layer_store import HostStore, block_bytes, places_of
from qlora_kit.base.linear import QuantizedLinear, base_matmul, dequantize
from qlora_kit.base.streamed_base import stream_layers
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.lora.inject import activate
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss

CPU = torch.device("cpu")
LAYERS = 4
MIX = ("full", "selective", "none", "none")


def prepared(family="llama2", dtype=torch.float32, *, bits=4, **changes):
    settings = {"num_hidden_layers": LAYERS, "targets": "all-linear", "packed": True, **changes}
    return adapted_model(family, dtype, bits=bits, **settings)


def batch_of(packed, length=17, seed=0):
    rows = [token_ids(1, length, seed=seed + number)[0].tolist() for number in range(4)]
    encoded = [Encoded(row, [-100, *row[1:]]) for row in rows]
    return collate_packs([encoded[:2], encoded[2:]], 0) if packed else collate(encoded, 0)


def results_of(model, *batches):
    """Losses and the gradients of some micro-batches, added up."""
    model.zero_grad(set_to_none=True)
    losses = []
    for place, batch in enumerate(batches):
        for module in model.modules():
            if hasattr(module, "seek"):
                module.seek(1, place)
        loss = supervised_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**{f"loss {n}": loss for n, loss in enumerate(losses)}, **gradients}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


CASES = [
    ("llama3", 4, torch.float32, {}),
    ("llama2", 4, torch.bfloat16, {}),
    ("llama_bias", 8, torch.float32, {"own": False}),
    ("qwen2", 16, torch.float32, {"own": False, "targets": "auto"}),  # torch keeps weights
    ("qwen3", 16, torch.bfloat16, {}),
    ("gemma2", 4, torch.float32, {}),
    ("gemma3", 8, torch.bfloat16, {"num_hidden_layers": 3}),
    ("gemma4", 4, torch.float32, {"num_hidden_layers": 3}),  # keys and values of other layers
]


@pytest.mark.parametrize(("family", "bits", "dtype", "settings"), CASES)
def test_losses_and_gradients_are_those_of_a_resident_base(family, bits, dtype, settings):
    model = prepared(family, dtype, bits=bits, dropout=0.1, **settings)
    batches = batch_of(False), batch_of(True, 9)
    expected = results_of(model, *batches)
    stream_layers(model, CPU)
    for levels in ("none", "selective", "full", MIX[-len(decoder_layers(model)) :]):
        set_recompute(model, levels)
        assert_same(results_of(model, *batches), expected)


class Noted:
    """A store that notes what it is asked for; it takes `seconds`, and fails at layer `bad`."""

    waits = True

    def __init__(self, blocks):
        self.store, self.blocks = HostStore(blocks, waits=True), blocks
        self.seconds, self.asked, self.bad = 0.0, [], None

    def load(self, number, block):
        self.asked.append(number)
        if number == self.bad:
            raise ModelError("the store cannot", "mend it")
        time.sleep(self.seconds)
        self.store.load(number, block)

    def hashes(self):
        """Of what it holds."""
        return [hashlib.sha256(block.numpy()).digest() for (block,) in self.blocks]


def streamed(model):
    """The `Noted` store that a model is streamed from now."""
    places = places_of(list(decoder_layers(model)))
    store = Noted([block_of(one) for one in places])
    stream_layers(model, CPU, store_of=lambda found: store)
    return store


def block_of(places):
    block = torch.zeros(block_bytes(places), dtype=torch.uint8)
    for place in places:
        place.of(block).data.copy_(place.tensor)
    return [block]


def test_a_layer_is_loaded_once_forward_and_once_backward():
    """But for the two that each direction begins with, which the other one ended with."""
    model = prepared(num_hidden_layers=5)
    store = streamed(model)
    results_of(model, batch_of(False))
    assert store.asked == [0, 1, 2, 3, 4, 2, 1, 0]
    store.asked.clear()
    results_of(model, batch_of(False))
    assert store.asked == [2, 3, 4, 2, 1, 0]
    store.asked.clear()
    with torch.no_grad():
        supervised_loss(model, batch_of(False))
        supervised_loss(model, batch_of(False))
    assert store.asked == [2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_steps_and_evaluations_take_turns_and_the_bytes_stay():
    """In any order; what leaves the model as numbers is asked for, and is what it was."""
    model = prepared(dropout=0.1)
    batches = batch_of(False), batch_of(True)
    expected = results_of(model, *batches)
    with torch.no_grad():
        evaluated = supervised_loss(model.eval(), batches[0])
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    dense = [dequantize(layer, torch.float32) for layer in layers]
    store = streamed(model)
    before = store.hashes()
    for _ in range(2):
        assert_same(results_of(model.train(), *batches), expected)
        with torch.no_grad():
            assert torch.equal(supervised_loss(model.eval(), batches[0]), evaluated)
    for layer, weight in reversed(list(zip(layers, dense, strict=True))):
        assert torch.equal(dequantize(layer, torch.float32), weight)
    assert store.hashes() == before


def test_layers_that_share_a_weight_are_refused():
    model = prepared()
    layers = decoder_layers(model)
    layers[2].mlp.up_proj = layers[1].mlp.up_proj
    with pytest.raises(ConfigError, match="share weights"):
        stream_layers(model, CPU)


def test_without_its_adapters_a_model_is_its_base():
    model, batch = prepared(), batch_of(False)
    activate(model, None)
    with torch.no_grad():
        expected = supervised_loss(model, batch)
        stream_layers(model, CPU)
        assert torch.equal(supervised_loss(model, batch), expected)


@pytest.mark.parametrize("level", ["none", "full"])
def test_a_pass_that_ended_in_the_middle_leaves_nothing_to_mend(level):
    """As a device that is full ends it, or a signal, at any layer, forward or backward."""
    model, batch = prepared(dropout=0.1), batch_of(False)
    expected = results_of(model, batch)
    streamed(model)
    set_recompute(model, level)
    linears = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    for linear, method in itertools.product(linears[3::5], ("matmul", "grad_input")):

        def fails(*args, **options):
            raise MemoryError

        setattr(linear, method, fails)
        with pytest.raises(MemoryError):
            results_of(model, batch)
        delattr(linear, method)
        assert_same(results_of(model, batch), expected)


def test_a_store_that_fails_is_the_error_and_may_be_mended():
    model, batch = prepared(num_hidden_layers=6), batch_of(False)
    expected = results_of(model, batch)
    store = streamed(model)
    for store.bad in range(6):
        with pytest.raises(ModelError, match="the store cannot"):
            results_of(model, batch, batch)
        good, store.bad = store.bad, None
        assert_same(results_of(model, batch), expected)
        store.bad = good


def test_out_of_its_turn_a_layer_is_loaded_and_no_other_one_read():
    model = prepared()
    layers = [layer.mlp.down_proj.base_layer for layer in decoder_layers(model)]
    x = torch.ones(1, layers[0].in_features)
    expected = [base_matmul(layer, x) for layer in layers]
    stream_layers(model, CPU)
    for number in (3, 0, 2, 1, 3, 0):
        assert layers[number].weight.is_meta
        for again in range(2):
            assert torch.equal(base_matmul(layers[number], x), expected[number]), again


def test_loads_go_on_while_layers_compute():
    """Forward and backward of n layers take max(load, compute) a layer, and not their sum."""
    model, batch, seconds = prepared(num_hidden_layers=8), batch_of(False, 9), 0.02
    store = streamed(model)
    for layer in decoder_layers(model):
        layer.register_forward_hook(partial(takes, seconds))
    results_of(model, batch)
    began = time.perf_counter()
    results_of(model, batch)
    without = time.perf_counter() - began
    store.seconds = seconds
    began = time.perf_counter()
    results_of(model, batch)
    taken = time.perf_counter() - began
    # A layer computes 16 times, and 12 times another one is loaded meanwhile.
    assert without >= 16 * seconds
    assert taken < without + 12 * seconds / 2


def takes(seconds, module, args, output):
    """A layer's forward takes so long, and its backward."""
    time.sleep(seconds)
    output.register_hook(lambda gradient: time.sleep(seconds))

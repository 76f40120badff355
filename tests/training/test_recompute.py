"""Laws of the recompute levels: the same bits, and what each of them keeps."""

from __future__ import annotations

import pytest
import torch
from adapted import RANK, adapted_model
from families import FAMILIES, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.target import processor_with
from qlora_kit.kernels import attention
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.plan.levels import layer_work
from qlora_kit.training.layer_forward import models_own_code, set_recompute
from qlora_kit.training.loss import supervised_loss

LAYERS = 3
LEVELS = ("none", "selective", "full")
MIX = ("full", "selective", "none")


def prepared(family="llama2", dtype=torch.float32, *, bits=4, targets="all-linear", **changes):
    """A tiny model, of 4 bits where nothing is said, with random adapters that trains."""
    settings = {"num_hidden_layers": LAYERS, **changes}
    return adapted_model(family, dtype, bits=bits, packed=True, targets=targets, **settings)


def batch_of(packed, length=17):
    rows = [token_ids(1, length, seed=number)[0].tolist() for number in range(4)]
    encoded = [Encoded(row, [-100, *row[1:]]) for row in rows]
    return collate_packs([encoded[:2], encoded[2:]], 0) if packed else collate(encoded, 0)


def results_of(model, batch):
    model.zero_grad(set_to_none=True)
    loss = supervised_loss(model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def check_levels(model, batch):
    """Loss and gradients are the same bits at every level and mix."""
    expected = results_of(model, batch)
    assert len(expected) > 1
    assert all(one.isfinite().all() and one.any() for one in expected.values())
    for levels in ("selective", "full", MIX, MIX[::-1], "none"):
        set_recompute(model, levels)
        found = results_of(model, batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), levels


OPPOSITES = [
    ((torch.float32, False, 0.1, True), (torch.bfloat16, True, 0.0, False)),
    ((torch.float32, True, 0.0, True), (torch.bfloat16, False, 0.1, False)),
    ((torch.float32, True, 0.1, False), (torch.bfloat16, False, 0.0, True)),
    ((torch.float32, False, 0.0, False), (torch.bfloat16, True, 0.1, True)),
]
"""Dtype, packed, dropout, own blocks: each value is in one of two, any three of them in a row."""


@pytest.mark.parametrize(
    ("family", "dtype", "packed", "dropout", "own"),
    [(one, *way) for place, one in enumerate(FAMILIES) for way in OPPOSITES[place % 4]],
)
def test_every_level_and_mix_gives_the_same_bits(family, dtype, dropout, packed, own):
    """Each family with each value of each option, families taking turns."""
    check_levels(prepared(family, dtype, own=own, dropout=dropout), batch_of(packed))


IN_BITS = [
    (4, torch.float16),
    (8, torch.float32),
    (8, torch.bfloat16),
    (8, torch.float16),
    (16, torch.float32),
    (16, torch.bfloat16),
    (16, torch.float16),
]
WAYS = [((True, False), (False, True)), ((True, True), (False, False))]
"""With matrix tiles, packed: two of the four ways for a number of bits, the others for the next."""


@pytest.mark.parametrize(
    ("bits", "dtype", "tiles", "packed"),
    [(*point, *way) for place, point in enumerate(IN_BITS) for way in WAYS[place % 2]],
)
def test_so_it_does_in_every_number_of_bits(bits, dtype, tiles, packed, monkeypatch):
    """With our blocks and either attention; what the test above leaves out."""
    monkeypatch.setattr(attention, "TILES", tiles)
    model = prepared(dtype=dtype, bits=bits, dropout=0.0 if packed else 0.1)
    check_levels(model, batch_of(packed))


@pytest.mark.parametrize(
    ("family", "option"), [("llama2", "attention_dropout"), ("phi3", "resid_pdrop")]
)
@pytest.mark.parametrize("own", [True, False])
def test_a_base_with_dropout_draws_the_same_again(family, option, own):
    own = own and family == "llama2"  # the other is no block of ours
    model, batch = prepared(family, own=own, **{option: 0.2}), batch_of(packed=False)
    results = []
    for level in (*LEVELS, MIX):
        set_recompute(model, level)
        torch.manual_seed(5)
        results.append(results_of(model, batch))
    expected, *others = results
    for found in others:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_models_own_code_is_recomputed_too():
    model, batch = prepared(), batch_of(packed=False)
    with models_own_code():
        expected = results_of(model, batch)
        for level in ("selective", "full"):
            set_recompute(model, level)
            found = results_of(model, batch)
            assert all(torch.equal(found[name], expected[name]) for name in expected), level


def test_wrong_counts_of_levels_are_refused():
    with pytest.raises(ValueError, match="zip"):
        set_recompute(tiny_model(), ["full"])


def kept_by_a_layer(level, *, batch=2, length=32, **changes):
    """Bytes that are alive after forward, of one layer more: kept for backward, or leaked."""
    totals = []
    for layers in (2, 3):
        model = prepared(dtype=torch.bfloat16, num_hidden_layers=layers, **changes)
        set_recompute(model, level)
        ids = token_ids(batch, length)
        positions = torch.arange(length).expand(ids.shape)
        with StorageCounter(model) as counter:
            hidden = model.base_model(
                input_ids=ids, position_ids=positions, use_cache=False
            ).last_hidden_state
            totals.append(counter.current - counter.before)
            hidden.sum().backward()
    return totals[1] - totals[0]


HIDDEN, HEADS, FFN = 64, 4, 160


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("tiles", "targets"), [(True, "all-linear"), (False, "q_proj,v_proj"), (False, "all-linear")]
)
def test_a_layer_keeps_what_is_listed(tiles, own, kv_heads, targets, monkeypatch):
    """The formulas of the modules, in bytes; the copies of keys for query heads are their own."""
    monkeypatch.setattr(attention, "TILES", tiles)
    tokens = 2 * 32
    row = 2 * tokens * HIDDEN
    attended = row + (4 * tokens * HEADS if tiles else 0)
    sizes = {"intermediate_size": FFN, "num_key_value_heads": kv_heads}
    with processor_with(torch.bfloat16):  # without, attention keeps what fp32 matmuls need
        kept = {
            level: kept_by_a_layer(level, own=own, targets=targets, **sizes) for level in LEVELS
        }
    assert kept["full"] == row
    assert kept["selective"] == row + attended + (row if own else 0)
    assert kept["none"] > kept["selective"]
    if own:
        kv, adapted = HIDDEN * kv_heads // HEADS, 2 if targets == "q_proj,v_proj" else 7
        scales, low_rank = 2 * 4 * tokens, adapted * 2 * tokens * RANK
        wide = 2 * tokens * ((3 if adapted == 2 else 4) * HIDDEN + 2 * kv + 2 * FFN)
        assert kept["none"] == wide + scales + low_rank


class Calls(TorchDispatchMode):
    """Counts the calls of attention's kernel that are carried out."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
            torch.ops.qlora_kit.attend_in_blocks.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("tiles", [True, False])
def test_selective_runs_attention_once(tiles, own, monkeypatch):
    """The kernel is called in forward alone; `full` calls it again."""
    monkeypatch.setattr(attention, "TILES", tiles)
    counts = {}
    for level in LEVELS:
        model, batch = prepared(dtype=torch.bfloat16, own=own), batch_of(packed=False)
        set_recompute(model, level)
        with Calls() as calls:
            results_of(model, batch)
        counts[level] = calls.count
    assert counts == {"none": LAYERS, "selective": LAYERS, "full": 2 * LAYERS}


def count_products(layer):
    """The frozen linears of a layer by name, with how often each is multiplied by from now on."""
    found, counts = {}, {}
    for name, module in layer.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        found[name], counts[name] = module, 0

        def counted(x, name=name, module=module):
            counts[name] += 1
            return type(module).matmul(module, x)

        module.matmul = counted
    return found, counts


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_selective_ends_before_the_last_products(targets):
    """q, k, v, gate and up are decoded again, the output and down projections are not."""
    model, batch = prepared(targets=targets), batch_of(packed=False)
    again = {}
    for level in LEVELS:
        set_recompute(model, level)
        _, counts = count_products(model.base_model.layers[1])
        results_of(model, batch)
        parts = {name.removesuffix(".base_layer"): count for name, count in counts.items()}
        again[level] = {name.rpartition(".")[2] for name, count in parts.items() if count == 2}
    inner = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert again == {"none": set(), "selective": inner, "full": inner | {"o_proj"}}


@pytest.mark.parametrize(
    ("targets", "made"), [("q_proj,v_proj", [1, 1, 1]), ("all-linear", [2, 3, 3])]
)
def test_rows_of_the_last_product_are_made_where_they_are_read(targets, made, monkeypatch):
    """In forward, and for an adapter's gradients; a replay hands them to the adapter alone."""
    real, calls = Gate.recompute, []
    monkeypatch.setattr(
        Gate, "recompute", lambda *args, **kept: calls.append(1) or real(*args, **kept)
    )
    model, batch = prepared(targets=targets), batch_of(packed=False)
    found = []
    for level in ("none", "selective", "full"):
        set_recompute(model, level)
        calls.clear()
        results_of(model, batch)
        found.append(len(calls) / LAYERS)
    assert found == made


@pytest.mark.parametrize(
    ("family", "targets", "own"),
    [
        (family, targets, (targets == "auto") == (place % 2 == 0))
        for place, family in enumerate(FAMILIES)
        for targets in ("auto", "all-linear")
    ],
)
def test_the_work_of_a_level_is_what_is_done_again(family, targets, own):
    """What `auto` weighs levels by, attention left out; each family with both blocks in turn."""
    model, batch = prepared(family, targets=targets, own=own), batch_of(packed=False)
    layer = model.base_model.layers[1]
    for level in LEVELS:
        set_recompute(model, level)
        found, counts = count_products(layer)
        results_of(model, batch)
        again = sum(
            (counts[name] - 1) * one.in_features * one.out_features for name, one in found.items()
        )
        assert again == layer_work(layer, level, 0, own), level

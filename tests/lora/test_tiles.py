"""Laws of tiled MLPs: the bits of all tokens at once, and memory for a tile."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from adapted import adapted_model
from families import FAMILIES, tiny_model, token_ids
from late_copies import Late

from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError
from qlora_kit.lora import low_rank
from qlora_kit.lora.dropout import TILE_TOKENS, each_tile
from qlora_kit.lora.layer import LoRALinear
from qlora_kit.plan.levels import layer_work
from qlora_kit.training.layer_forward import set_offload, set_recompute, use_fused_blocks
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.offload import Offload
from qlora_kit.training.prepare import prepare_model

TILED = Placement(mlp_tiled=True)
LEVELS = ("none", "selective", "full")
LENGTH = 530  # 4 rows of it are two tiles of unequal size and more


def batch_of(packed=False, length=LENGTH):
    rows = [token_ids(1, length, seed=number)[0].tolist() for number in range(4)]
    encoded = [Encoded(row, [-100, *row[1:]]) for row in rows]
    return collate_packs([encoded[:2], encoded[2:]], 0) if packed else collate(encoded, 0)


def results_of(model, batches, step=1):
    """The losses of some micro-batches and their summed gradients."""
    model.zero_grad(set_to_none=True)
    losses = {}
    for number, batch in enumerate(batches):
        for module in model.modules():
            if hasattr(module, "seek"):
                module.seek(step, number)
        loss = supervised_loss(model, batch)
        loss.backward()
        losses[f"loss {number}"] = loss.detach()
    return losses | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_tiles(model, batches, levels=LEVELS):
    expected = results_of(model, batches)
    assert len(expected) > 5
    assert all(one.isfinite().all() and one.any() for one in expected.values())
    assert use_fused_blocks(model, tiled=True) is None
    for level in levels:
        set_recompute(model, level)
        found = results_of(model, batches)
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            assert torch.equal(found[name], one), (level, name, (found[name] - one).abs().max())


EVERY_PAIR = [(4, False, 0.1, "all-linear"), (16, True, 0.0, "auto"), (8, True, 0.1, "all-linear")]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_give_the_bits_of_all_tokens_at_once(family):
    bits, packed, dropout, targets = EVERY_PAIR[FAMILIES.index(family) % 3]
    model = adapted_model(
        family, bits=bits, dropout=dropout, packed=True, targets=targets, num_hidden_layers=2
    )
    levels = LEVELS if bits == 4 else ("full",)
    check_tiles(model, [batch_of(packed), batch_of(packed, 40)], levels)


@pytest.mark.parametrize("family", ["olmo2", "glm4", "gemma4", "ministral3"])
def test_so_they_do_in_newer_families(family):
    """Norms in other places, norms behind, embeddings of the layer's own, queries scaled."""
    model = adapted_model(family, bits=4, dropout=0.1, packed=True, targets="all-linear")
    check_tiles(model, [batch_of(packed=True)], ("full",))


def test_so_they_do_where_replays_begin_on_the_host():
    """With copies that arrive as late as they may: tiles write over what has come back alone."""
    model = adapted_model("qwen3", bits=4, packed=True, targets="all-linear", num_hidden_layers=3)
    set_offload(model, Offload(Late()))
    check_tiles(model, [batch_of(packed=True)], LEVELS[1:])


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_so_they_do_where_adapters_are_computed_together(family, monkeypatch):
    """As on CUDA, where what is kept of A x is scaled; in bf16, whose sums a tile rounds alike."""
    monkeypatch.setattr(low_rank, "device_type", lambda x: "cuda")
    model = adapted_model(family, torch.bfloat16, packed=True, targets="all-linear")
    assert {one.scaling["default"] for one in adapted_linears(model)}.isdisjoint({1.0})
    check_tiles(model, [batch_of()], ("full",))


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_computed_a_third_time(family, level):
    """The work beside forward's is what plans weigh a level by, and no more than at `full`."""
    model = adapted_model(family, bits=4, packed=True, targets="all-linear")
    assert use_fused_blocks(model, tiled=True) is None
    set_recompute(model, level)
    layer, counts = model.base_model.layers[1], Counter()
    found = {n: m for n, m in layer.named_modules() if isinstance(m, QuantizedLinear)}
    for name, module in found.items():

        def counted(x, name=name, module=module):
            counts[name] += x.numel() // x.shape[-1]
            return type(module).matmul(module, x)

        module.matmul = counted
    batch = batch_of()
    results_of(model, [batch])
    size = {name: module.in_features * module.out_features for name, module in found.items()}
    work = sum(size[name] * counts[name] for name in found) / batch["input_ids"].numel()
    assert work - sum(size.values()) == layer_work(layer, level, 0, True)
    assert layer_work(layer, level, 0, True) <= layer_work(layer, "full", 0, True)


def test_evaluation_goes_over_tiles_too():
    model, batch = adapted_model("gemma2", bits=4, packed=True), batch_of(packed=True)
    model.eval()
    with torch.no_grad():
        expected = supervised_loss(model, batch)
        assert use_fused_blocks(model, tiled=True) is None
        assert torch.equal(supervised_loss(model, batch), expected)


def test_a_layer_of_no_block_is_refused_tiles_or_said_to_have_none():
    model = tiny_model("phi3", resid_pdrop=0.1)
    with pytest.raises(ConfigError, match="tiled_mlp true: Phi3DecoderLayer stays as it is"):
        prepare_model(model, TrainingConfig(tiled_mlp=True), "none", placement=TILED)
    note = prepare_model(model, TrainingConfig(), "none", placement=TILED)
    assert note is not None
    assert note.endswith("its MLPs do not go over tiles")


def adapted_linears(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def test_tiles_are_even():
    for count in (0, 1, 2, TILE_TOKENS, TILE_TOKENS + 1, 3 * TILE_TOKENS - 5, 10**6 + 7):
        found = [rows for _, rows in each_tile(torch.empty(count, 0))]
        assert [i for one in found for i in (one.start, one.stop)][1:-1] == [
            i for one in found[1:] for i in (one.start, one.start)
        ]
        assert (found[0].start, found[-1].stop) == (0, count)
        sizes = [one.stop - one.start for one in found]
        assert max(sizes) <= TILE_TOKENS
        assert len(sizes) == 1 or min(sizes) >= TILE_TOKENS // 2 - len(sizes)

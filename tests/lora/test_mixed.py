"""Laws of batches whose rows have adapters of their own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from adapted import quantize
from any_model import random_model
from families import relative_error, tiny_model, token_ids
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from qlora_kit.base.decoder import CACHE
from qlora_kit.errors import AdapterError
from qlora_kit.lora import dropout, mixed, passes
from qlora_kit.lora.inject import lora_layer, lora_layers, switch_of
from qlora_kit.lora.layer import LoRALinear
from qlora_kit.lora.low_rank import Part
from qlora_kit.lora.mixed import Mixed, Stacks
from qlora_kit.lora.stack import FROM_STEP, RowsRoom
from qlora_kit.lora.switch import Switch
from qlora_kit.lora.targets import all_linear
from qlora_kit.training.layer_forward import use_fused_blocks

EXACT = 3e-5
"""Of fp32 logits, whatever the adapter's dtype: sums in another order."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A frozen adapter: what the bank holds, drawn."""

    name: str
    parts: dict

    def part(self, layer):
        return self.parts.get(layer)


def drawn(model, name, *, r, scaling=1.5, dtype=torch.float32, only=""):
    """An adapter of rank `r` on the linears whose name holds `only`."""
    parts, generator = {}, torch.Generator().manual_seed(len(name) * 1000 + ord(name[-1]))
    for path, layer in lora_layers(model).items():
        if only in path:
            shapes = (r, layer.in_features), (layer.out_features, r)
            a, b = (torch.randn(shape, generator=generator) * 0.08 for shape in shapes)
            parts[layer] = Part(layer.base_layer, (a.to(dtype), b.to(dtype)), scaling, dtype)
    return Drawn(name, parts)


def adaptable(family="llama2", bits=16, dtype=torch.float32, **changes):
    """A model whose linears can have adapters, and its switch."""
    model = tiny_model(family, dtype, **changes)
    if bits < 16:
        quantize(model, bits)
    model.requires_grad_(False)
    switch = Switch()
    for name in all_linear(model):
        lora_layer(model, name, switch)
    return model, switch_of(model)


def of_all_kinds(model):
    """Ranks, scalings, targets and dtypes that differ, and a row with none; two rows share one."""
    a = drawn(model, "a", r=4)
    c = drawn(model, "c", r=4, scaling=0.7, only="layers.1")
    b, d = drawn(model, "b", r=9, scaling=2.0, only="layers.0"), drawn(model, "d", r=3, scaling=0.4)
    return [a, None, b, c, a, d, drawn(model, "e", r=4, dtype=torch.bfloat16)]


@torch.no_grad()
def answers(model, switch, active, ids, steps=FROM_STEP):
    """Logits of a prompt and of some tokens after it, which the cache is read for."""
    switch.active = active
    mask = torch.ones_like(ids)
    mask[1::2, :3] = 0  # padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    out = model(input_ids=ids, use_cache=True, **given)
    found = [out.logits[:, 3:]]
    for step in range(steps):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        positions = positions[:, -1:] + 1
        given = {"attention_mask": mask, "position_ids": positions}
        fed = (ids[:, :1] + step) % 250 + 4
        out = model(input_ids=fed, **{CACHE: getattr(out, CACHE)}, **given)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("gathered", [-1, 10**9])
@pytest.mark.parametrize(
    ("family", "bits"),
    [("llama2", 16), ("llama_bias", 4), ("phi3", 8), ("gemma4", 4), ("gemma3n", 16)],
)
def test_each_row_is_what_its_adapter_gives_alone(family, bits, gathered, monkeypatch):
    """A prompt and what follows it, padded rows among them, by either way of computing."""
    monkeypatch.setitem(mixed.GATHERED, "cpu", gathered)
    model, switch = adaptable(family, bits)
    adapters = of_all_kinds(model)
    ids = token_ids(len(adapters), 16)
    together = answers(model, switch, Mixed.of(adapters), ids)
    base = answers(model, switch, None, ids)
    assert torch.equal(together[1], base[1])
    for adapter in dict.fromkeys(adapters):
        alone = answers(model, switch, adapter, ids)
        for row, one in enumerate(adapters):
            if one is adapter:
                assert relative_error(together[row], alone[row]) < EXACT
                assert adapter is None or relative_error(base[row], alone[row]) > 0.01


@torch.no_grad()
def test_rows_of_a_model_whose_mlps_go_over_tiles_keep_their_adapters(monkeypatch):
    """Of a tile nothing says whose tokens it has: here each is of one row alone."""
    monkeypatch.setattr(dropout, "TILE_TOKENS", 16)
    model, switch = adaptable("llama2", 4)
    mix, ids = Mixed.of([drawn(model, "a", r=4), drawn(model, "b", r=4)]), token_ids(2, 16)
    switch.active = mix
    expected = model(input_ids=ids, use_cache=False).logits
    switch.active = None  # blocks are tried on a few tokens
    assert use_fused_blocks(model, tiled=True) is None
    switch.active = mix
    assert relative_error(model(input_ids=ids, use_cache=False).logits, expected) < EXACT


def test_base_products_do_not_grow_with_adapters(monkeypatch):
    model, switch = adaptable(bits=4)
    adapters, calls = [drawn(model, name, r=4) for name in "abcdefgh"], []
    real = passes.base_matmul

    def counted(layer, x):
        calls.append(x.shape[0])
        return real(layer, x)

    monkeypatch.setattr(passes, "base_matmul", counted)
    for count in (1, 3, 8):
        calls.clear()
        answers(model, switch, Mixed.of((adapters[:count] * 8)[:8]), token_ids(8, 16), steps=1)
        assert calls == [8] * 2 * 14  # the prompt and one step, each linear once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_row_is_its_adapter_s_to_roundings(dtype):
    model, switch = adaptable("qwen3", 4, dtype)
    adapters = [drawn(model, name, r=4, dtype=dtype) for name in "abc"] + [None]
    ids = token_ids(4, 16)
    together = answers(model, switch, Mixed.of(adapters), ids).float()
    for row, adapter in enumerate(adapters):
        alone = answers(model, switch, adapter, ids)[row].float()
        # Logits of two layers: rounded as often as there are operations, about ten a layer.
        assert relative_error(together[row], alone) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("which", "value"), [(0, torch.inf), (1, 3e38)])
def test_what_other_rows_do_does_not_reach_a_row(which, value):
    """Not even what is infinite in fp16 for another adapter, or is once its B is scaled."""
    model, switch = adaptable()
    a, wild = drawn(model, "a", r=4), drawn(model, "wild", r=4)
    ids = token_ids(3, 16)
    alone = answers(model, switch, Mixed.of([a, None, None]), ids)
    for part in wild.parts.values():
        part.weights[which].fill_(value)
    beside = answers(model, switch, Mixed.of([a, None, wild]), ids)
    assert torch.equal(beside[1], alone[1])
    assert relative_error(beside[0], alone[0]) < EXACT
    assert not beside[2].isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("gathered", [-1, 10**9])
@pytest.mark.parametrize("other", [64.0, 2.0, 1e6])
@pytest.mark.parametrize(("own", "down", "up"), [(64.0, 60, 1e-6), (0.5, 0.06, 1e-2)])
def test_what_fp16_can_hold_of_a_row_alone_it_can_beside_others(
    own, down, up, other, gathered, monkeypatch
):
    """A x of 480 is over 65504 if it is scaled, and one of 0.5 nothing as a millionth of itself."""
    monkeypatch.setitem(mixed.GATHERED, "cpu", gathered)
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(64, 48, bias=False).half().requires_grad_(False)
    base.weight.zero_()
    layer = LoRALinear(base)

    def adapter(name, scaling):
        lora_a = down * torch.randn(8, 64, generator=generator)
        lora_b = up * torch.randn(48, 8, generator=generator)
        part = Part(base, (lora_a.half(), lora_b.half()), scaling, torch.float16)
        return Drawn(name, {layer: part})

    a, beside = adapter("a", own), adapter("b", other)
    x = torch.randn(2, 40, 64, generator=generator).half()
    layer.switch.active = a
    alone = layer(x)[0].float()
    layer.switch.active = Mixed.of([a, beside])
    together = layer(x)[0].float()
    assert alone.isfinite().all()
    # A x is rounded, and rounded again as it is scaled, and the sum is.
    assert relative_error(together, alone) < 4 * torch.finfo(torch.float16).eps


@torch.no_grad()
def test_one_adapter_for_all_rows_is_no_mix():
    model, _ = adaptable()
    a = drawn(model, "a", r=4)
    assert Mixed.of([a, a]) is a
    assert Mixed.of([None, None]) is None
    assert Mixed.of([]) is None
    mix = Mixed.of([a, None])
    assert mix.name == "by row: a, none"
    part = mix.part(next(iter(a.parts)))
    assert part.has_update
    assert part.weights == ()  # A and B of one adapter, and here are several


def test_rows_that_come_and_go_build_nothing_anew():
    """Matrices are made for an adapter that was not there; old ones stay while they are few."""
    model, switch = adaptable()
    adapters = [drawn(model, f"a{number}", r=4) for number in range(12)]
    first = Mixed.of(adapters[:3])
    answers(model, switch, first, token_ids(3, 16))
    assert first.stacks.held_bytes == sum(
        4 * (3 * 4 + 1) * (layer.in_features + layer.out_features) for layer in first.stacks.made
    )
    for rows in ([adapters[2], None], [adapters[1], adapters[0], adapters[1], None]):
        assert Mixed.of(rows, first.stacks).stacks is first.stacks
    grown = Mixed.of([adapters[3], adapters[0]], first.stacks)
    assert set(grown.stacks.adapters) == set(adapters[:4])
    again = Mixed.of(adapters[4:11], grown.stacks)
    assert len(again.stacks.adapters) == mixed.KEPT
    many = Mixed.of(adapters[:10], again.stacks)
    assert set(many.stacks.adapters) == set(adapters[:10])
    # What one batch of many needed does not stay for ever.
    assert Mixed.of([*adapters[:5], None], many.stacks).stacks is many.stacks
    assert len(Mixed.of([adapters[0], None], many.stacks).stacks.adapters) == mixed.KEPT


def test_rows_that_stay_together_have_copies_within_a_limit_while_their_mix_lives():
    model, switch = adaptable()
    adapters = [drawn(model, "a", r=4), drawn(model, "b", r=3), None]
    ids, most = token_ids(3, 20), 2**16
    held = {}
    for room in (RowsRoom(), RowsRoom(most), RowsRoom(0)):
        mix = Mixed.of(adapters, Stacks((), room))
        held[room.most] = answers(model, switch, mix, ids, steps=FROM_STEP - 1)
        assert room.nbytes == 0
        again = answers(model, switch, mix, ids, steps=1)
        widths = sum(one.in_features + one.out_features for one in mix.stacks.made)
        copied = 4 * 3 * 4 * widths  # fp32, rows, the largest rank
        assert room.nbytes == copied if room.most > most else 0 <= room.nbytes <= room.most
        assert bool(room.nbytes) == bool(room.most)
        # The same rows by another way of computing.
        assert relative_error(again, held[room.most][:, : again.shape[1]]) < EXACT
        switch.active = mix = None
        assert room.nbytes == 0
    # Rows that would repeat one adapter too often multiply by the stack.
    room = RowsRoom()
    mix = Mixed.of([adapters[0]] * 7 + [adapters[2]], Stacks((), room))
    answers(model, switch, mix, token_ids(8, 16))
    assert room.nbytes == 0


def test_a_mix_is_refused_where_a_graph_is_made_or_rows_are_not_to_be_found():
    model, switch = adaptable()
    switch.active = Mixed.of([drawn(model, "a", r=4), None])
    with pytest.raises(AdapterError, match="without gradients"):
        model(input_ids=token_ids(2, 16))
    layer = next(iter(lora_layers(model).values()))
    copy = Part(torch.nn.Linear(layer.in_features, layer.out_features))
    merged = Mixed.of([drawn(model, "a", r=4), Drawn("merged", {layer: copy})])
    with torch.no_grad(), pytest.raises(AdapterError, match="'merged' is merged"):
        merged.part(layer)
    for shape in ((3, 5, 64), (1, 2, 5, 64), (5, 64)):
        with torch.no_grad(), pytest.raises(AdapterError, match="tokens of 2 rows"):
            layer(torch.zeros(shape))


def check_rows_are_as_alone(model):
    model.eval().requires_grad_(False)
    switch = Switch()
    for name in all_linear(model):
        lora_layer(model, name, switch)
    adapters = of_all_kinds(model)
    ids = token_ids(len(adapters), 16)
    together = answers(model, switch, Mixed.of(adapters), ids)
    for row, adapter in enumerate(adapters):
        alone = answers(model, switch, adapter, ids)[row]
        assert relative_error(together[row], alone) < EXACT


def test_a_model_that_hands_over_all_rows_as_one_is_right():
    """OPT's MLP reads (B * T, h)."""
    config = OPTConfig(
        vocab_size=264,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    torch.manual_seed(1)
    check_rows_are_as_alone(OPTForCausalLM(config))


def test_low_rank_attention_that_hands_over_one_head_of_all_is_right():
    """It expands keys and values of (B, 1, T, rank)."""
    check_rows_are_as_alone(random_model("youtu"))

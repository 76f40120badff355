"""Laws of the dense families that came after the first seven: each is transformers' own model.

What sets them apart is in their tiny models (`DENSE`): layers without a rotary embedding, norms
behind attention and the MLP, norms of all heads at once, queries scaled by position, values turned
with their neighbours, a fused gate and up of another name, long and partial rotary embeddings.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from exact import adapter_gradients, exact_gradients, gradient_errors
from families import (
    DENSE,
    LIKE_LLAMA,
    edit_config,
    randomize_adapter,
    refused,
    relative_error,
    save_checkpoint,
    token_ids,
)
from micro_batches import ragged_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.export.export import export_model
from qlora_kit.generation.decode import generate_ids
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.prepare import prepare_model

LEVELS = ("none", "selective", "full")
FFN = 174
"""Rows are no multiple of a quantization block."""
UNPACKED = ("granite4", "granite4_nope")
"""transformers (5.23) gives their attention no positions: rows of a pack would see each other."""


@pytest.fixture(params=DENSE)
def base(request, base_of):
    return base_of(request.param, FFN)


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **inputs).logits


def load(base, bits=16, dtype="fp32"):
    return load_base(str(base), bits=bits, dtype=dtype, device="cpu").model


def prepared(base, bits=4, dtype="fp32", level="none", dropout=0.0):
    """As `finetune` prepares it, its adapters drawn; with a fused block in every layer."""
    model = load(base, bits, dtype)
    inject_lora(model, LoRAConfig(r=4, alpha=8, dropout=dropout, target_modules="all-linear"))
    randomize_adapter(model, scale=0.05)
    assert prepare_model(model, TrainingConfig(), level) is None
    return model.train()


def test_logits_are_transformers_own(base):
    """Shorter and longer than windows, and than where a long rotary embedding begins."""
    reference, ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), load(base)
    assert type(ours) is type(reference)
    for length in (6, 24, 100):
        ids = token_ids(2, length)
        assert torch.equal(logits(ours, ids), logits(reference, ids))
    quantized = load(base, 4)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            reference.get_submodule(name).weight.data = dequantize(module, torch.float32)
    assert torch.equal(logits(quantized, token_ids()), logits(reference, token_ids()))
    prepare_model(quantized, TrainingConfig(), "none")
    found = logits(quantized, token_ids())
    assert relative_error(found, logits(reference, token_ids())) <= 1e-5


ROUNDS = zip(
    DENSE, itertools.cycle((4, 8, 16)), itertools.cycle(LEVELS), itertools.cycle((0.1, 0.0)),
    strict=False,
)  # fmt: skip


@pytest.mark.parametrize(("family", "bits", "level", "dropout"), list(ROUNDS))
def test_gradients_equal_double_precision(base_of, family, bits, level, dropout):
    ours = prepared(base_of(family, FFN), bits, "fp32", level, dropout)
    for module in ours.modules():
        if isinstance(module, KeyedDropout):
            module.seek(3, 1)
    rows = ragged_rows(4)
    packed = family not in UNPACKED and bits != 8
    batch = collate_packs([rows[:3], rows[3:]], 0) if packed else collate(rows, 0)

    def plain_loss(model):
        found = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        targets = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(
            found[:, :-1].double().flatten(0, 1), targets, reduction="sum"
        )

    supervised_loss(ours, batch).backward()
    exact = exact_gradients(ours, plain_loss)
    assert max(gradient_errors(adapter_gradients(ours), exact)) <= 1e-5


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_families_like_llama_are_transformers_own(base_of, family):
    """Logits without adapters, gradients of packs on weights in 4 bits, with blocks of ours."""
    base = base_of(family, FFN)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(load(base), token_ids()), logits(reference, token_ids()))
    test_gradients_equal_double_precision(base_of, family, 4, "selective", 0.1)


def test_levels_of_recompute_give_the_same_bits(base):
    ours, batch, found = prepared(base, 4, "bf16", dropout=0.1), collate(ragged_rows(3), 0), []
    for level in LEVELS:
        set_recompute(ours, level)
        ours.zero_grad()
        loss = supervised_loss(ours, batch)
        loss.backward()
        found.append(
            [loss.detach(), *(p.grad.clone() for p in ours.parameters() if p.requires_grad)]
        )
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.fixture(scope="module")
def trained_of(base_of):
    """Makes a prepared model of a family, each once, for tests that do not change it."""
    return functools.cache(lambda family: prepared(base_of(family, FFN)).eval())


@pytest.mark.parametrize("family", DENSE)
def test_padding_on_either_side_changes_nothing(trained_of, family):
    ours, ids = trained_of(family), token_ids(1, 20)
    alone = logits(ours, ids, position_ids=torch.arange(20)[None])
    padding = torch.zeros(1, 12, dtype=torch.int64)
    behind = logits(ours, torch.cat((ids, padding), 1), position_ids=torch.arange(32)[None])
    mask = torch.cat((padding, torch.ones_like(ids)), 1)
    before = logits(
        ours,
        torch.cat((padding, ids), 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    )
    assert relative_error(behind[:, :20], alone) <= 1e-5
    assert relative_error(before[:, 12:], alone) <= 1e-5


@pytest.mark.parametrize("family", [name for name in DENSE if name not in UNPACKED])
def test_rows_of_a_pack_do_not_see_each_other(trained_of, family):
    ours, rows = trained_of(family), ragged_rows(3)
    pack = collate_packs([rows], 0)
    found = logits(ours, pack["input_ids"], position_ids=pack["position_ids"])
    first = 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        alone = logits(ours, ids, position_ids=torch.arange(ids.shape[1])[None])
        assert relative_error(found[:, first : first + ids.shape[1]], alone) <= 1e-5
        first += ids.shape[1]


def test_packs_are_refused_where_attention_gets_no_positions(trained_of):
    """And rightly: the second row of a pack reads the first one."""
    ours, rows = trained_of("granite4"), ragged_rows(2)
    pack, second = collate_packs([rows], 0), torch.tensor([rows[1].input_ids])
    with pytest.raises(ConfigError, match=r"packing .*'granitemoehybrid' does not keep"):
        supervised_loss(ours, pack)
    first = len(rows[0].input_ids)
    packed = logits(ours, pack["input_ids"], position_ids=pack["position_ids"])[:, first:]
    alone = logits(ours, second, position_ids=torch.arange(second.shape[1])[None])
    assert relative_error(packed[:, : second.shape[1]], alone) > 1e-3


@pytest.mark.parametrize("family", DENSE)
def test_generation_with_a_cache_is_transformers(trained_of, family):
    """Prompts of two lengths, so that one is padded; together longer than the windows.

    A long rotary embedding turns by the longest row of a batch, so that none here is long for it.
    """
    ours, prompts = trained_of(family), [[5, 6, 7], list(range(20, 30))]
    steps = generate_ids(ours, prompts, max_new_tokens=6, eos_ids=(), pad_id=0)
    for prompt, found in zip(prompts, zip(*steps, strict=True), strict=True):
        ids = torch.tensor([prompt])
        theirs = ours.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(found) == theirs[0, len(prompt) :].tolist()


def test_a_merge_is_read_by_plain_transformers(base, tmp_path):
    loaded = load_base(str(base), bits=4, dtype="fp32", device="cpu")
    inject_lora(loaded.model, LoRAConfig(r=2, target_modules="all-linear"))
    randomize_adapter(loaded.model, scale=0.05)
    export_model(loaded, tmp_path / "export")
    written, original = (
        {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (tmp_path / "export", base)
    )
    assert written == original
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert relative_error(logits(exported, token_ids()), logits(loaded.model, token_ids())) <= 1e-5


def test_ministrals_rope_without_its_scale_of_queries_is_refused(tmp_path):
    save_checkpoint(tmp_path / "base", "ministral3")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    edit_config(tmp_path / "base", rope_parameters=rope)

    with refused(ModelError, "lack llama_4_scaling_beta", directory=tmp_path):
        open_base(BaseConfig(str(tmp_path / "base")))

"""Laws of an embedding in the host's memory: the same bits, and its weight not on the device."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from counted_steps import counted_step
from families import save_checkpoint, save_tokenizer, token_ids
from micro_batches import ragged_rows

from qlora_kit.base.embedding import HostEmbedding, ids_on_host
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.tensors import model_tensors
from qlora_kit.lora.inject import inject_lora
from qlora_kit.plan.plan import BatchShape, Planner
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

ON_HOST = Placement(embedding_on_host=True)
LORA = LoRAConfig(r=4, target_modules="all-linear", dropout=0.1)
CASES = {
    "llama2": ("llama2", {}),
    "tied": ("qwen2", {"head_bits": 4}),
    "scaled": ("gemma3", {"head_bits": 8}),
    "per_layer": ("gemma4", {}),  # tied: the embeddings of the layers alone are on the host
    "resized": ("llama2", {"resize_embeddings": True}),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The options of a base by its case, its files written once."""

    @functools.cache
    def written(family, extra):
        directory = tmp_path_factory.mktemp(family)
        save_checkpoint(directory, family)
        save_tokenizer(directory, extra)
        return str(directory)

    def made(case, **more):
        family, options = CASES[case]
        directory = written(family, 20 if case == "resized" else 0)
        return BaseConfig(directory, bits=4, dtype="fp32", device="cpu", **options, **more)

    return made


def trained(base, placement, packed, level):
    """What two steps of two micro-batches give: losses, gradients and adapters, and the model."""
    opened = open_base(base)
    model = read_weights(opened, placement=placement)
    model = inject_lora(model, LORA, seed=5)
    prepare_model(model, TrainingConfig(), level, packed, placement)
    optimizer = make_optimizer("adamw", model.parameters(), 1e-2)
    found = {}
    for step in (1, 2):
        rows = ragged_rows(8, seed=step)
        batches = [rows[:4], rows[4:]]
        batches = [collate_packs([b[:2], b[2:]], 0) if packed else collate(b, 0) for b in batches]

        def seen(step, loss, norm, model=model):
            named = model.named_parameters()
            grads = {f"{step} {n}": p.grad.clone() for n, p in named if p.grad is not None}
            found.update({f"{step} loss": loss.clone(), f"{step} norm": norm.clone(), **grads})
            return True

        model.train()
        train_step(model, batches, optimizer, step=step, max_grad_norm=1.0, before_step=seen)
    return opened, model, found


@pytest.mark.parametrize(
    ("case", "packed", "level"),
    [
        ("llama2", True, "full"),
        ("tied", False, "none"),
        ("scaled", True, "selective"),
        ("per_layer", False, "full"),
        ("resized", True, "none"),
    ],
)
def test_training_is_the_same_bit_for_bit(base_of, case, packed, level):
    """With dropout, packs, accumulation and recompute; what is exported is the same too."""
    opened, model, found = trained(base_of(case), ON_HOST, packed, level)
    plain_opened, plain, expected = trained(base_of(case), ON_DEVICE, packed, level)
    moved = [one for one in model.modules() if isinstance(one, HostEmbedding)]
    assert len(moved) == 1
    assert not any(one.weight is parameter for one in moved for parameter in model.parameters())
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
    assert model.state_dict().keys() == plain.state_dict().keys()
    for ours, theirs in zip(model_tensors(opened), model_tensors(plain_opened), strict=True):
        assert ours.name == theirs.name
        assert torch.equal(ours.make(), theirs.make()), ours.name


def test_a_tied_embedding_stays_and_says_so(base_of):
    """Its head needs the weight; the embeddings of the layers move all the same."""
    notes = []
    model = read_weights(open_base(base_of("per_layer")), placement=ON_HOST, note=notes.append)
    assert not isinstance(model.get_input_embeddings(), HostEmbedding)
    assert isinstance(model.base_model.embed_tokens_per_layer, HostEmbedding)
    (note,) = notes
    assert "the head shares it; with --head_bits 8 or 4" in note
    assert "that of the layers is in host memory" in note
    notes.clear()
    read_weights(open_base(base_of("tied")), placement=ON_HOST, note=notes.append)
    assert notes == []


def test_rows_are_those_of_the_ids_that_the_host_knows(base_of):
    """Known ids are of one tensor: another one of the same shape is looked up by itself."""
    model = read_weights(open_base(base_of("llama2")), placement=ON_HOST)
    embedding, ids, others = model.get_input_embeddings(), token_ids(), token_ids(seed=9)
    with ids_on_host(ids, others):
        assert torch.equal(embedding(ids), embedding.weight[others])
        assert torch.equal(embedding(ids.view(-1, ids.shape[1])), embedding.weight[others])
        assert torch.equal(embedding(ids[:1]), embedding.weight[ids[:1]])
        assert torch.equal(embedding(others), embedding.weight[others])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    with pytest.raises(IndexError):
        embedding(torch.tensor([[10**6]]))


@pytest.mark.parametrize(("case", "level"), [("tied", "none"), ("llama2", "full")])
def test_planned_equals_counted(base_of, case, level):
    """With a head in tiles; on the CPU all of it is one memory."""
    base = base_of(case) if case == "tied" else base_of(case, head_bits=8)
    training = TrainingConfig(
        optim="adamw", gradient_checkpointing=level, batch_size=2, gradient_accumulation_steps=2
    )
    batches = [collate_rows(2, 48, seed) for seed in (1, 2)]
    plan = Planner(base, LORA, training).plan(BatchShape(2, 48, 48), placement=ON_HOST)
    intervals = counted_step(base, LORA, training, level, batches, batches[0], ON_HOST)
    for phase in ("forward", "backward", "step"):
        peak = max(one.peak for one in intervals if one.phase == phase)
        assert plan.phases[phase] == peak, phase
    for name in ("weights_quantized", "weights_other", "activations", "workspace"):
        assert plan.bytes[name] == max(one.largest.get(name, 0) for one in intervals), name


def collate_rows(rows, length, seed):
    ids = token_ids(rows, length, seed).tolist()
    return collate([Encoded(row, [-100, *row[1:]]) for row in ids], 0)


@pytest.mark.parametrize("case", ["tied"])
def test_a_plan_for_cuda_has_the_weight_on_the_host(base_of, case):
    base = base_of(case)
    planner = Planner(base, LORA, TrainingConfig(), "cuda")
    shape = BatchShape(1, 32, 31)
    here, there = (planner.plan(shape, placement=one) for one in (ON_DEVICE, ON_HOST))
    model = read_weights(open_base(base), placement=ON_HOST)
    (moved,) = (one for one in model.modules() if isinstance(one, HostEmbedding))
    nbytes = moved.weight.nbytes
    assert here.bytes["weights_other"] - there.bytes["weights_other"] == nbytes
    assert here.phases["backward"] - there.phases["backward"] == nbytes
    # While it is loaded it never was on the device.
    assert there.phases["load"] <= here.phases["load"]
    assert there.host_peak_bytes >= nbytes


def test_auto_moves_no_embedding_that_stays_and_a_plan_says_it(base_of):
    """Of a head in 16 bits that shares it; what was asked for is noted."""
    tied = replace(base_of("tied"), head_bits=16)
    auto, asked = (
        Planner(tied, LORA, TrainingConfig(offload_embedding=one), "cuda") for one in (None, True)
    )
    assert not any(one.embedding_on_host for one in auto.placements)
    assert len(auto.placements) == len(set(auto.placements)) > 1
    assert not any("offload_embedding" in note for note in auto.notes)
    assert any("offload_embedding: the embedding stays" in note for note in asked.notes)
    own = Planner(base_of("tied"), LORA, TrainingConfig(), "cuda")
    assert any(one.embedding_on_host for one in own.placements)

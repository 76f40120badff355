"""Packed rows give what each gives alone, on every attention path and recompute level."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from adapted import adapted_model
from families import FAMILIES, VOCABULARY, relative_error, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, masking_utils

from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.training.attention import NAMES, attend, positions_unread, set_packed_attention
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss

LENGTHS = [[9, 5, 23, 2], [17, 30], [3]]
LIBRARY = {family: "eager" if family == "gemma2" else "sdpa" for family in FAMILIES}
"""sdpa has no soft cap of attention, and transformers refuses it."""
PATHS = [
    *((family, "eager") for family in FAMILIES),
    *((family, "sdpa") for family in FAMILIES if LIBRARY[family] == "sdpa"),
    *((family, path) for family in FAMILIES for path in ("rows", "cuda")),
]
"""`rows` is ours, and `cuda` ours by the kernels of a card, which are plain matmuls here."""
CARD = (9, 0)
TOLERANCE = 1e-5
"""Of fp32: the two sides sum in another order."""
CHANGES = {"phi3": {"original_max_position_embeddings": 64}}
"""Long rope takes other factors for a whole batch once one position is beyond this."""


def packs_of(lengths=LENGTHS):
    packs = []
    for number, part in enumerate(lengths):
        rows = []
        for place, length in enumerate(part):
            ids = token_ids(1, length, seed=10 * number + place)[0].tolist()
            labels = [-100, *(t if i % 3 else -100 for i, t in enumerate(ids[1:]))]
            labels[-1] = ids[-1]
            rows.append(Encoded(ids, labels))
        packs.append(rows)
    return packs


@pytest.fixture(scope="module")
def model_of():
    models = {}

    def get(family, path):
        if (family, path) not in models:
            model = tiny_model(family, **CHANGES.get(family, {}))
            model.requires_grad_(False)
            for parameter in model.base_model.layers.parameters():
                parameter.requires_grad_(parameter.dim() == 2)
            models[family, path] = model
            if path != "eager":
                model.set_attn_implementation(LIBRARY[family])
            if path in ("rows", "cuda"):
                assert set_packed_attention(model)
        return models[family, path]

    return get


@contextlib.contextmanager
def kernels_of(path):
    """Inside, our attention is that of a card where the path says so."""
    for library, name in NAMES.items():
        card = CARD if path == "cuda" else None
        AttentionInterface.register(name, partial(attend, library=library, card=card))
    try:
        yield
    finally:
        for library, name in NAMES.items():
            AttentionInterface.register(name, partial(attend, library=library))


def loss_and_gradients(model, batches):
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = supervised_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_up_to_rounding(ours, reference):
    assert ours[0] == pytest.approx(reference[0], rel=TOLERANCE)
    assert ours[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        error = (ours[1][name] - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE, name


@pytest.mark.parametrize("level", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "path"), PATHS)
def test_packed_rows_are_separate_rows(model_of, family, path, level):
    model = model_of(family, path)
    set_recompute(model, level)
    packs = packs_of()
    with kernels_of(path):
        packed = loss_and_gradients(model, [collate_packs(packs, 0)])
        alone = loss_and_gradients(model, [collate([row], 0) for pack in packs for row in pack])
    assert_equal_up_to_rounding(packed, alone)


@pytest.mark.parametrize("path", ["rows", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_the_librarys_attention(model_of, family, path):
    """Windows and soft caps included, packed and not, outputs and gradients."""
    ours, theirs = model_of(family, path), model_of(family, "eager")
    batches = [
        collate_packs(packs_of(), 0),
        collate([row for pack in packs_of() for row in pack], 0),
    ]
    for model in (ours, theirs):
        set_recompute(model, "none")
    with kernels_of(path):
        found = loss_and_gradients(ours, batches)
    assert_equal_up_to_rounding(found, loss_and_gradients(theirs, batches))


def test_the_library_keeps_what_ours_is_not_for():
    for family, path, changes in (
        ("llama3", "eager", {}),
        ("gemma2", "sdpa", {}),
        ("mistral", "sdpa", {"attention_dropout": 0.1}),
        ("gemma2", "eager", {"use_bidirectional_attention": True}),
    ):
        model = tiny_model(family, **changes)
        model.config._attn_implementation = path
        assert not set_packed_attention(model)
        assert model.config._attn_implementation == path


@pytest.mark.parametrize("path", ["rows", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_no_positions_and_makes_no_mask(model_of, family, path):
    model = model_of(family, path)
    set_recompute(model, "full")
    for batch in (collate_packs(packs_of(), 0), collate(packs_of()[0], 0)):
        with kernels_of(path), NoMask(batch["labels"].shape[1]):
            supervised_loss(model, batch).backward()


class NoMask(TorchDispatchMode):
    """Refuses reads by the host, and tensors of booleans with two dimensions of a length."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and one.dtype is torch.bool:
                assert list(one.shape).count(self.length) < 2, func
        return found


def test_rows_leak_where_positions_do_not_begin_again(model_of):
    # What this guards against: the same packs with positions that go on.
    model = model_of("llama3", "sdpa")
    set_recompute(model, "none")
    batch = collate_packs(packs_of(), 0)
    leaking = {**batch, "position_ids": torch.arange(batch["labels"].shape[1]).expand(3, -1)}
    right, _ = loss_and_gradients(model, [batch])
    wrong, _ = loss_and_gradients(model, [leaking])
    assert abs(wrong - right) > 1e-3 * right


def test_a_cache_makes_transformers_leak_between_packed_rows(model_of):
    # The upstream trap: with a cache the positions of packed rows isolate nothing.
    model = model_of("llama3", "sdpa").eval()
    batch = collate_packs(packs_of(), 0)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        isolated = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True).logits
    assert (isolated - cached).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama3", "qwen3", "mistral", "gemma2"])
def test_without_packs_both_attentions_are_one(model_of, family):
    # Plain batches, padding on the left with a mask, and decoding with a cache.
    ours, theirs = (model_of(family, path).eval() for path in ("rows", LIBRARY[family]))
    batch = collate([row for pack in packs_of() for row in pack], 0)
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for inputs in (
            {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]},
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        ):
            a, b = (m(**inputs, use_cache=False).logits for m in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_right_and_no_padding_are_one(model_of, family, own):
    """Outputs and gradients; `own` is our block in 4 bits, recomputed, with its attention."""
    if own:
        changes = CHANGES.get(family, {})
        model = adapted_model(family, bits=4, packed=True, targets="all-linear", **changes)
        set_recompute(model, ("full", "selective"))
    else:
        model = model_of(family, "eager").eval()
    ids = token_ids(1, 13)
    pad = torch.zeros(1, 6, dtype=torch.int64)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)
    weights = torch.randn(13, VOCABULARY, generator=torch.Generator().manual_seed(4))

    def results(tokens, place, **inputs):
        model.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False, **inputs).logits[:, place]
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    alone, gradients = results(ids, slice(None))
    right = results(torch.cat([ids, pad], 1), slice(13))
    # Not 0 for padding: each would be a row of its own, and the mask would not matter.
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    left = results(
        torch.cat([pad, ids], 1), slice(6, None), attention_mask=mask, position_ids=positions
    )
    assert len(gradients) > 1
    for logits, found in (right, left):
        assert (logits - alone).abs().max() <= TOLERANCE * alone.abs().max()
        for ours, reference in zip(found, gradients, strict=True):
            assert relative_error(ours, reference) <= TOLERANCE


def test_only_the_thread_that_knows_its_rows_leaves_positions_unread():
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    with positions_unread(), ThreadPoolExecutor(1) as pool:
        assert masking_utils.find_packed_sequence_indices(positions) is None
        other = pool.submit(masking_utils.find_packed_sequence_indices, positions).result()
    assert other.tolist() == [[0, 0, 1, 1, 1]]
    assert torch.equal(masking_utils.find_packed_sequence_indices(positions), other)

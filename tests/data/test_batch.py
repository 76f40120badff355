import random
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config.data import DataConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data import order as orders
from qlora_kit.data.batch import (
    collate,
    collate_packs,
    eval_batches,
    lengths_of,
    padded,
    padding_id,
    padding_note,
    split,
)
from qlora_kit.data.order import make_packs
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.tokens import Encoded

PAD = 7


def epoch_order(*arguments):
    return orders.epoch_order(*arguments).tolist()


def grouped_order(*arguments):
    return orders.grouped_order(*arguments).tolist()


def make_rows(lengths, seed=0):
    """Rows that can be told apart: row n begins with token 1000 + n."""
    draw = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = [1000 + number, *(draw.randrange(100) for _ in range(length - 1))]
        labels = [-100, *(token if draw.random() < 0.5 else -100 for token in ids[1:])]
        labels[-1] = ids[-1]
        rows.append(Encoded(ids, labels))
    return rows


def schedule_of(rows, *, num_steps=1, **options):
    return StepSchedule(rows=rows, num_steps=num_steps, pad_id=PAD, **options)


def names(batches):
    return [int(first) - 1000 for batch in batches for first in batch["input_ids"][:, 0]]


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 99))
def test_a_batch_is_its_rows_padded_on_the_right(lengths, seed):
    rows = make_rows(lengths, seed)
    batch = collate(rows, PAD)
    longest = -(-max(lengths) // 16) * 16
    for index, row in enumerate(rows):
        gap = longest - len(row.input_ids)
        assert batch["input_ids"][index].tolist() == row.input_ids + [PAD] * gap
        assert batch["labels"][index].tolist() == row.labels + [-100] * gap
        assert batch["position_ids"][index].tolist() == list(range(longest))
    expected = [
        b * longest + t
        for b, row in enumerate(rows)
        for t in range(len(row.labels) - 1)
        if row.labels[t + 1] != -100
    ]
    assert batch["supervised"].tolist() == expected
    assert batch["num_supervised"] == len(expected)
    assert batch["lengths"] == lengths
    assert batch["num_supervised"] == sum(len(r.labels) - r.labels.count(-100) for r in rows)
    dtypes = {k: v.dtype for k, v in batch.items() if isinstance(v, torch.Tensor)}
    assert dtypes.pop("row_starts") is torch.int32  # as kernels take it
    assert set(dtypes.values()) == {torch.int64}
    assert batch["row_lengths"] == [[longest]] * len(rows)
    assert batch["row_starts"].tolist() == list(range(0, (len(rows) + 1) * longest, longest))
    assert all(v.is_contiguous() for v in batch.values() if isinstance(v, torch.Tensor))


def test_supervised_positions_give_the_loss_of_shifted_labels():
    rows = make_rows([5, 2, 9])
    batch = collate(rows, PAD)
    logits = torch.randn(
        3, 16, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    flat, chosen = logits.flatten(0, 1), batch["supervised"]
    targets = batch["labels"].flatten()[chosen + 1]
    ours = torch.nn.functional.cross_entropy(flat[chosen], targets, reduction="sum")
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**63 - 1))
def test_an_epoch_shows_every_row_once_in_its_order(num_rows, batch_size, accumulation, seed):
    rows = make_rows([2] * num_rows)
    schedule = schedule_of(rows, batch_size=batch_size, accumulation=accumulation, seed=seed)
    per_epoch = schedule.steps_per_epoch
    steps = list(replace(schedule, num_steps=2 * per_epoch))
    for epoch in range(2):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert names(batch for step in part for batch in step) == epoch_order(num_rows, seed, epoch)
        # Full steps of full micro-batches; what is short comes last.
        sizes = [[len(batch["input_ids"]) for batch in step] for step in part]
        assert all(step == [batch_size] * accumulation for step in sizes[:-1])
        assert all(size == batch_size for size in sizes[-1][:-1])
        assert 1 <= len(sizes[-1]) <= accumulation
        assert 1 <= sizes[-1][-1] <= batch_size


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_a_resumed_run_sees_what_the_whole_run_would_have(lengths, batch_size, accumulation, start):
    rows = make_rows(lengths)

    schedule = schedule_of(
        rows, batch_size=batch_size, accumulation=accumulation, num_steps=12, seed=3
    )
    whole, resumed = list(schedule), list(schedule.after(start))
    assert len(whole) == 12
    assert len(resumed) == 12 - start
    for ours, theirs in zip(resumed, whole[start:], strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for key, value in a.items():
                same = torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key]
                assert same, key


def test_skipped_steps_are_not_touched():
    class Watched(list):
        def __getitem__(self, index):
            touched.append(index)
            return super().__getitem__(index)

    touched = []
    rows = Watched(make_rows([2] * 10))
    schedule = schedule_of(rows, batch_size=2, num_steps=8, seed=0)
    assert names(next(iter(schedule.after(7)))) == touched == epoch_order(10, 0, 1)[4:6]


def test_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    random.seed(0)
    first = epoch_order(100, 42, 3)
    torch.manual_seed(1)
    random.seed(1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert epoch_order(100, 42, 3) == first
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert sorted(first) == list(range(100))
    others = [epoch_order(100, 42, 4), epoch_order(100, 43, 3), epoch_order(100, 4, 23)]
    assert first not in others
    assert len({tuple(order) for order in others}) == 3


def test_order_is_the_same_on_every_machine():
    # A checkpoint relies on it: these numbers may only change with the checkpoint's version.
    assert epoch_order(8, 42, 0) == [6, 1, 5, 2, 0, 3, 4, 7]


def test_every_position_is_reached_alike():
    # 2000 seeds: each of 5 rows comes first 400 times, standard deviation 18.
    firsts = [epoch_order(5, seed, 0)[0] for seed in range(2000)]
    assert all(300 < firsts.count(row) < 500 for row in range(5))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 16), st.integers(1, 40))
def test_steps_of_a_run_are_the_epochs_rounded_up(num_rows, batch_size, accumulation, tenths):
    per_epoch = len(range(0, num_rows, batch_size * accumulation))
    config = TrainingConfig(
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=tenths / 10,
    )
    rows = make_rows([2]) * num_rows
    schedule = StepSchedule.of_run(rows, DataConfig(data="sample"), config, PAD)
    assert schedule.steps_per_epoch == per_epoch
    exact = Fraction(tenths, 10) * per_epoch
    assert schedule.num_steps == -(-exact.numerator // exact.denominator)
    config = replace(config, max_steps=17)
    assert StepSchedule.of_run(rows, DataConfig(data="sample"), config, PAD).num_steps == 17


def test_a_rounding_error_is_no_step():
    assert 1.1 * 50 > 55
    config = TrainingConfig(batch_size=1, gradient_accumulation_steps=1, num_train_epochs=1.1)
    rows = make_rows([2]) * 50
    assert StepSchedule.of_run(rows, DataConfig(data="sample"), config, PAD).num_steps == 55


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 5))
def test_evaluation_sees_every_row_once_with_little_padding(lengths, batch_size):
    rows = make_rows(lengths)
    batches = list(eval_batches(rows, batch_size, PAD))
    assert sorted(names(batches)) == list(range(len(rows)))
    padded = [b["input_ids"].numel() for b in batches]
    unsorted = [
        -(-max(lengths[i : i + batch_size]) // 16) * 16 * len(lengths[i : i + batch_size])
        for i in range(0, len(rows), batch_size)
    ]
    if len(rows) % batch_size == 0:
        assert sum(padded) <= sum(unsorted)
    widths = [b["input_ids"].shape[1] for b in batches]
    assert widths == sorted(widths)
    bounded = list(eval_batches(rows, batch_size, PAD, 64))
    assert names(bounded) == names(batches)
    assert all(len(b["lengths"]) == 1 or b["input_ids"].numel() <= 64 for b in bounded)


@pytest.mark.parametrize(
    ("pad", "eos", "expected", "said"),
    [
        (3, 2, 3, None),
        (0, 2, 0, None),
        (2, 2, 2, "the pad token is also EOS; padding is never trained on"),
        (None, 2, 2, "no pad token: padding with EOS; padding is never trained on"),
        (None, None, 0, "no pad token: padding with token 0; padding is never trained on"),
    ],
)
def test_padding_is_pad_else_eos_else_zero_and_says_so(pad, eos, expected, said):
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert padding_id(tokenizer) == expected
    note = padding_note(tokenizer)
    assert note is None if said is None else note.startswith(said)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def summed_loss(model, batch):
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    chosen = batch["supervised"]
    targets = batch["labels"].flatten()[chosen + 1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[chosen].double(), targets, reduction="sum"
    )


def test_without_a_mask_padding_changes_no_loss():
    # fp32 sums of 2 layers, in another order.
    model, rows = tiny_llama(), make_rows([9, 3, 6])
    with torch.no_grad():
        together = summed_loss(model, collate(rows, PAD))
        other_padding = summed_loss(model, collate(rows, 0))
        alone = sum(summed_loss(model, collate([row], PAD)) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(together, other_padding, rtol=1e-5, atol=0)


def test_a_short_last_step_divided_by_its_tokens_is_one_batch():
    # Five rows in micro-batches of two, weighted by tokens.
    model, rows = tiny_llama(), make_rows([9, 3, 6, 2, 4])
    (micro_batches,) = schedule_of(rows, batch_size=2, accumulation=4, num_steps=1, seed=1)
    assert [len(b["input_ids"]) for b in micro_batches] == [2, 2, 1]
    with torch.no_grad():
        one = collate(rows, PAD)
        reference = summed_loss(model, one) / one["num_supervised"]
        ours = sum(summed_loss(model, b) for b in micro_batches) / sum(
            b["num_supervised"] for b in micro_batches
        )
        means = [summed_loss(model, b) / b["num_supervised"] for b in micro_batches]
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    # What this guards against: the mean of means is another number.
    assert abs(sum(means) / 3 - reference) > 1e-4


# --- order by length, packs, parts ---------------------------------------------------------------

many_lengths = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@settings(max_examples=200, deadline=None)
@given(many_lengths, st.integers(0, 99))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths, seed):
    lengths = np.array(lengths, dtype=np.int32)
    packs = make_packs(lengths, 64, seed)
    members = [packs[i] for i in range(len(packs))]
    assert sorted(row for pack in members for row in pack) == list(range(len(lengths)))
    sums = [int(lengths[pack].sum()) for pack in members]
    assert all(0 < total <= 64 for total in sums)
    # Best fit, longest first: never more than 11/9 of the fewest packs possible, and 1 (Johnson).
    assert (
        len(packs) <= 11 / 9 * -(-int(lengths.sum()) // 64) + len(lengths) * (max(lengths) > 32) + 1
    )
    assert [packs[i] for i in range(len(packs))] == members
    again = make_packs(lengths, 64, seed)
    assert [again[i] for i in range(len(again))] == members


def test_packs_of_equal_rows_are_full_and_depend_on_the_seed():
    lengths = np.full(1000, 16, dtype=np.int32)
    one, other = make_packs(lengths, 64, 1), make_packs(lengths, 64, 2)
    assert len(one) == len(other) == 250
    assert one.rows.tolist() != other.rows.tolist()


@settings(max_examples=150, deadline=None)
@given(many_lengths, st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.integers(0, 3))
def test_rows_by_length_are_a_permutation_of_like_rows(lengths, batch, accumulation, seed, epoch):
    lengths = np.array(lengths, dtype=np.int32)
    per_step = batch * accumulation
    order = grouped_order(lengths, batch, per_step, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == grouped_order(lengths, batch, per_step, seed, epoch)
    if len(lengths) <= 50 * per_step:
        # Sorted together: the batches are those of the sorted rows, in some order.
        ranked = -np.sort(-lengths)
        whole = len(lengths) // batch * batch
        expected = sorted(map(tuple, ranked[:whole].reshape(-1, batch).tolist()))
        found = lengths[order[:whole]].reshape(-1, batch).tolist()
        assert sorted(map(tuple, found)) == expected


def test_by_length_there_is_less_padding_and_the_order_still_changes():
    draw = random.Random(0)
    lengths = np.array([draw.randint(10, 500) for _ in range(2000)], dtype=np.int32)
    grouped = grouped_order(lengths, 8, 16, 1, 0)
    rows = [Encoded([3] * length, [3] * length) for length in lengths]
    plain = schedule_of(rows, batch_size=8, accumulation=2, seed=1)
    assert replace(plain, group_by_length=True).padding_share() < 0.06
    assert plain.padding_share() > 0.3
    assert grouped != grouped_order(lengths, 8, 16, 1, 1)
    assert lengths[grouped].tolist() != sorted(lengths.tolist(), reverse=True)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 3))
def test_the_padding_share_is_what_batches_hold(lengths, batch_size):
    rows = make_rows(lengths)
    schedule = schedule_of(rows, batch_size=batch_size, seed=0)
    for kind in ({}, {"group_by_length": True}, {"packs": make_packs(lengths_of(rows), 48, 0)}):
        order = replace(schedule, **kind)
        epoch = replace(order, num_steps=order.steps_per_epoch)
        total = sum(batch["input_ids"].numel() for step in epoch for batch in step)
        assert order.padding_share() == pytest.approx(1 - sum(lengths) / total, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 99))
def test_a_pack_is_its_rows_one_after_the_other(packs, seed):
    rows = [make_rows(part, seed) for part in packs]
    batch = collate_packs(rows, PAD)
    width = padded(max(map(sum, packs)))
    for index, pack in enumerate(rows):
        ids = [token for row in pack for token in row.input_ids]
        labels = [label for row in pack for label in row.labels]
        gap = width - len(ids)
        assert batch["input_ids"][index].tolist() == ids + [PAD] * gap
        assert batch["labels"][index].tolist() == labels + [-100] * gap
        positions = [place for row in pack for place in range(len(row.input_ids))]
        assert batch["position_ids"][index, : len(ids)].tolist() == positions
        # Padding behind packed rows is a row of its own: no row's tokens, and none before it.
        if len(pack) > 1 and gap:
            assert batch["position_ids"][index, len(ids) :].tolist() == list(range(gap))
    assert batch["lengths"] == [sum(part) for part in packs]
    supervised = sum(len(r.labels) - r.labels.count(-100) for pack in rows for r in pack)
    assert batch["num_supervised"] == supervised == len(batch["supervised"])


def test_no_row_of_a_pack_is_predicted_by_the_one_before():
    # A row whose first token is supervised, which no encoding of ours gives.
    rows = [Encoded([1, 2], [-100, 2]), Encoded([3, 4], [3, 4])]
    batch = collate_packs([rows], PAD)
    assert batch["labels"][0, :4].tolist() == [-100, 2, -100, 4]


@settings(max_examples=60, deadline=None)
@given(
    lengths,
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 8),
    st.sampled_from(["random", "grouped", "packed"]),
)
def test_every_order_resumes_and_sees_every_row_once(
    lengths, batch_size, accumulation, start, kind
):
    rows = make_rows(lengths)
    packs = make_packs(lengths_of(rows), 48, 5) if kind == "packed" else None
    schedule = schedule_of(
        rows,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=5,
        packs=packs,
        group_by_length=kind == "grouped",
    )
    per_epoch = schedule.steps_per_epoch
    schedule = replace(schedule, num_steps=per_epoch + 9)
    whole, resumed = list(schedule), list(schedule.after(start))
    assert len(resumed) == len(whole) - start
    for ours, theirs in zip(resumed, whole[start:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["position_ids"], b["position_ids"])
    epoch = [schedule.rows_of(step + 1) for step in range(per_epoch)]
    assert sorted(row for step in epoch for row in step) == list(range(len(rows)))
    for chosen, micro_batches in zip(epoch, whole, strict=False):
        tokens = sum(len(rows[row].input_ids) for row in chosen)
        assert tokens == sum(sum(batch["lengths"]) for batch in micro_batches)


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=5), st.integers(1, 4))
def test_parts_of_a_batch_are_the_batch(packs, max_rows):
    rows = [make_rows(part) for part in packs]
    batch = collate_packs(rows, PAD)
    parts = list(split(batch, max_rows))
    assert [len(part["lengths"]) for part in parts[:-1]] == [max_rows] * (len(parts) - 1)
    alone = [
        collate_packs(rows[first : first + max_rows], PAD)
        for first in range(0, len(rows), max_rows)
    ]
    for part, expected in zip(parts, alone, strict=True):
        assert part.keys() == expected.keys()
        for key, value in part.items():
            same = (
                torch.equal(value, expected[key])
                if torch.is_tensor(value)
                else value == expected[key]
            )
            assert same, key

"""Laws of learning from pairs: the formulas in fp64, the same at every level, in any batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exact import exact_gradients, gradient_errors
from families import randomize_adapter
from micro_batches import ragged_rows

from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate_pairs, eval_pairs, split
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.training.guard import Guard
from qlora_kit.training.loop import train, train_step
from qlora_kit.training.loss import evaluate
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.preference import (
    Preference,
    log_probabilities,
    objective_of,
    reference_log_probabilities,
)

OBJECTIVES = [
    Preference(0.1),
    Preference(0.5, 0.2),
    Preference(0.3, kind="ipo"),
]


def pairs_of(count, seed=3):
    """A batch of random pairs; the reference is some way from what the model gives."""
    rows = ragged_rows(2 * count, seed)
    answered = [sum(label != -100 for label in row.labels[1:]) for row in rows]
    draw = torch.Generator().manual_seed(seed)
    reference = -4.5 * torch.tensor(answered) + torch.randn(2 * count, generator=draw)
    return collate_pairs(rows, reference, 0)


def gradients(model, batches, objective):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    found = {}

    def keep(step, means, norm):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return False

    means, _ = train_step(
        model,
        batches,
        optimizer,
        step=1,
        max_grad_norm=1.0,
        before_step=keep,
        objective=objective,
    )
    return means, found


def expected(logits, batch, objective):
    """The mean loss of a batch of pairs, its mean margin, and the share of margins above zero."""
    labels = batch["labels"][:, 1:]
    log_p = torch.log_softmax(logits[:, :-1].double(), -1)
    of_tokens = log_p.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * (labels != -100)
    ratios = of_tokens.sum(1) - batch["reference"].double()
    counts = (labels != -100).sum(1)
    losses, margins = [], []
    for c in range(0, len(ratios), 2):
        margin = objective.beta * (ratios[c] - ratios[c + 1])
        if objective.kind == "ipo":
            means = ratios / counts
            losses.append((means[c] - means[c + 1] - 1 / (2 * objective.beta)) ** 2)
        else:
            s = objective.label_smoothing
            right, wrong = 1 / (1 + torch.exp(-margin)), 1 / (1 + torch.exp(margin))
            losses.append(-(1 - s) * torch.log(right) - s * torch.log(wrong))
        margins.append(margin)
    margins = torch.stack(margins).detach()
    return torch.stack(losses).mean(), margins.mean(), (margins > 0).double().mean()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_step_is_the_formula_in_double(model, objective):
    """Sums of tens of log-probabilities in fp32: errors of some 1e-6."""
    ours, batch = model(4, recompute="selective", target_modules="all-linear"), pairs_of(4)
    randomize_adapter(ours)
    means, kept = gradients(ours, [batch], objective)
    found = {}

    def loss(reference):
        values = expected(reference(input_ids=batch["input_ids"]).logits, batch, objective)
        found["means"] = torch.stack([value.detach() for value in values])
        return values[0]

    ours.train()
    exact = exact_gradients(ours, loss)
    assert torch.allclose(means.double(), found["means"], rtol=1e-5, atol=1e-5)
    mine = {
        layer: [kept[f"{layer}.lora_{part}.default.weight"] for part in "AB"] for layer in exact
    }
    assert max(gradient_errors(mine, exact)) < 1e-4


def test_levels_of_recompute_change_no_bit(model):
    batch, found = pairs_of(3), []
    for level in ("none", "selective", "full"):
        ours = model(4, recompute=level, dropout=0.1, target_modules="all-linear")
        randomize_adapter(ours)
        found.append(gradients(ours, [batch], Preference(0.2, 0.1)))
    for means, grads in found[1:]:
        assert torch.equal(means, found[0][0])
        assert all(torch.equal(grads[name], one) for name, one in found[0][1].items())


def test_micro_batches_of_pairs_are_one_step(model):
    """Pairs stay together where the device holds one row less; their widths are their own."""
    ours, batch = model(16), pairs_of(4)
    randomize_adapter(ours)
    whole, grads = gradients(ours, [batch], Preference(0.1))
    for rows in (6, 4, 3, 1):
        parts = list(split(batch, rows))
        assert all(len(part["answered"]) % 2 == 0 for part in parts)
        assert len(parts) == math.ceil(4 / max(1, rows // 2))
        means, others = gradients(ours, parts, Preference(0.1))
        assert torch.allclose(means, whole, atol=1e-5)
        for name, grad in grads.items():
            assert (others[name] - grad).norm() <= 1e-4 * grad.norm()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_margins_rise_from_exactly_nothing(model, objective):
    """The model as it begins is the reference: no margin, and the loss that says so."""
    ours, rows = model(4, target_modules="all-linear"), ragged_rows(16)
    unknown = torch.zeros(len(rows))
    reference = reference_log_probabilities(ours, eval_pairs(rows, unknown, 4, 0), len(rows))
    held_out = [batch for _, batch in eval_pairs(rows, reference, 4, 0)]
    before = evaluate(ours, held_out, objective)
    assert before.measures == {"margin": 0.0, "accuracy": 0.0}
    nothing = 1 / (2 * objective.beta) ** 2 if objective.kind == "ipo" else math.log(2)
    assert before.loss == pytest.approx(nothing, rel=1e-6)
    schedule = StepSchedule(
        rows=rows, batch_size=2, num_steps=12, seed=0, pairs=True, reference=reference
    )
    optimizer = make_optimizer("adamw", ours.parameters(), 3e-3)
    history = train(ours, schedule, optimizer, objective=objective)
    after = evaluate(ours, held_out, objective)
    assert after.measures["margin"] > 0
    assert after.measures["accuracy"] > 0.8
    assert after.loss < before.loss
    assert history[-1].measures.keys() == {"margin", "accuracy"}


def test_a_schedule_has_every_pair_once_and_both_sides_in_one_batch(model):
    rows = ragged_rows(14)
    reference = torch.arange(14.0)
    schedule = StepSchedule(
        rows=rows, batch_size=2, num_steps=3, seed=1, accumulation=2, pairs=True,
        reference=reference,
    )  # fmt: skip
    assert schedule.steps_per_epoch == 2
    found = [
        int(one) for step in replace(schedule, num_steps=2) for b in step for one in b["reference"]
    ]
    assert sorted(found) == list(range(14))
    assert all(found[i] + 1 == found[i + 1] and found[i] % 2 == 0 for i in range(0, 14, 2))
    assert found[:8:2] == [2 * pair for pair in schedule.rows_of(1)]
    grouped = replace(schedule, group_by_length=True, num_steps=2)
    found = [int(one) for step in grouped for b in step for one in b["reference"]]
    assert sorted(found) == list(range(14))
    largest = schedule.largest()
    batch = schedule.collate(largest.sequences)
    assert batch["input_ids"].numel() == max(
        b["input_ids"].numel() for step in schedule for b in step
    )


def test_log_probabilities_are_minus_the_loss_of_each_row(model):
    ours, batch = model(16), pairs_of(2)
    with torch.no_grad():
        found = log_probabilities(ours, batch)
        total = evaluate(ours, [batch])
    assert float(-found.sum()) == pytest.approx(total.loss * total.tokens, rel=1e-6)


def test_options_of_pairs_go_with_their_method():
    assert objective_of(TrainingConfig(method="dpo")) == Preference(0.1)
    asked = TrainingConfig(method="dpo", beta=0.5, dpo_loss="ipo")
    assert objective_of(asked) == Preference(0.5, kind="ipo")
    for wrong in ({"beta": 0.1}, {"label_smoothing": 0.1}, {"dpo_loss": "sigmoid"}):
        with pytest.raises(ConfigError, match="without --method dpo"):
            TrainingConfig(**wrong)
    with pytest.raises(ConfigError, match="which has none"):
        TrainingConfig(method="dpo", dpo_loss="ipo", label_smoothing=0.1)
    assert not objective_of(TrainingConfig()).measures


def test_a_full_device_halves_pairs_and_never_a_pair(model):
    ours, batch, seen = model(16), pairs_of(3), []

    def backward(room):
        def run(parts):
            seen.append([len(part["answered"]) for part in parts])
            if max(seen[-1]) > room:
                raise MemoryError
            return torch.zeros(3)

        return run

    Guard(ours).run_backward(backward(2), [batch])
    assert seen == [[6], [4, 2], [2, 2, 2]]
    with pytest.raises(ResourceError, match="one pair of rows"):
        Guard(ours).run_backward(backward(1), [batch])

"""Laws of the verification: its figures are those of a plain computation over all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids

from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.verify import TOKEN_LIMIT, verify


def moved(model: Any, spread: float = 0.03) -> Any:
    """A copy of a model whose weights are a little elsewhere."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += torch.randn_like(parameter) * spread
    return other


ROWS = [token_ids(1, length, seed=length)[0].tolist() for length in (2, 9, 17, 30)]
BATCHES = [
    collate([Encoded(ids, ids) for ids in ROWS[:3]], pad_id=0),
    collate([Encoded(ROWS[3], ROWS[3])], pad_id=0),
]


@pytest.mark.parametrize("family", ["llama2", "gemma2", "granite"])
def test_figures_equal_those_of_all_logits_in_double(family: str) -> None:
    ours = tiny_model(family)
    theirs = moved(ours)
    result = verify(ours, theirs, BATCHES)
    kl, agreed, largest, tokens = 0.0, 0, 0.0, 0
    with torch.no_grad():
        for ids in ROWS:
            # One row at a time and nothing padded; the last token predicts none of the row.
            p, q = (model(torch.tensor([ids])).logits[0, :-1].double() for model in (ours, theirs))
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            largest = max(largest, float((p - q).abs().max()))
            tokens += len(ids) - 1
    assert result.tokens == tokens == 54
    assert result.kl == pytest.approx(kl / tokens, rel=1e-4)  # fp32 against fp64
    assert result.top1_agreement == agreed / tokens
    assert result.max_logit_difference == pytest.approx(largest, rel=1e-4)
    assert 0 < result.top1_agreement < 1
    assert result.as_dict() == {
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "max_logit_difference": result.max_logit_difference,
        "tokens": 54,
    }


def test_a_model_is_no_distance_from_itself() -> None:
    model = tiny_model()
    result = verify(model, copy.deepcopy(model), BATCHES)
    assert (result.kl, result.top1_agreement, result.max_logit_difference) == (0, 1, 0)


def test_the_divergence_is_from_the_trained_model() -> None:
    ours = tiny_model()
    theirs = moved(ours, 0.05)
    there, back = verify(ours, theirs, BATCHES), verify(theirs, ours, BATCHES)
    assert there.kl != pytest.approx(back.kl, rel=1e-3)  # it is no distance both ways
    assert there.top1_agreement == back.top1_agreement


def test_dropout_of_a_model_in_training_does_not_count() -> None:
    ours = tiny_model(attention_dropout=0.5).train()
    assert verify(ours, copy.deepcopy(ours), BATCHES).kl == 0


def test_reading_ends_once_enough_tokens_were_compared() -> None:
    model = tiny_model()
    ids = token_ids(1, 100)[0].tolist()
    row = Encoded(ids, ids)
    taken = []

    def endless() -> Any:
        while True:
            taken.append(collate([row] * 8, pad_id=0))
            yield taken[-1]

    result = verify(model, model, endless())
    per_batch = 8 * 99
    assert len(taken) == -(-TOKEN_LIMIT // per_batch)
    assert result.tokens == len(taken) * per_batch

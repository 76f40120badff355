"""How far a model's logits are from another's on the same rows, and its loss on them.

Logits are taken less their mean at each position, which no distribution depends on: so what
llama.cpp answers, log-probabilities, is compared like any model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.tokens import IGNORE, Encoded

Logits = Callable[[list[int]], Tensor]
"""From the ids of a row, (T,), to the logits after each, (T, vocabulary)."""


def of_model(model: Any) -> Logits:
    """The logits of a model of transformers, or of ours, one row at a time and without padding."""
    model.eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return found

    return logits


class Reference:
    """The logits of the model as trained on some rows, and what others are compared with."""

    def __init__(self, trained: Logits, rows: Sequence[Encoded]) -> None:
        self.rows = rows
        self.logits = [_centred(trained(row.input_ids)) for row in rows]

    def compare(self, other: Logits) -> dict[str, float]:
        """Distance and loss of another model, in nats a token.

        `logit_error` is the norm of the difference of all logits over the norm of the trained
        ones; `loss` is of the supervised tokens, as in training.
        """
        squares = torch.zeros(2, dtype=torch.float64)
        kl = agreed = largest = lost = 0.0
        positions = supervised = 0
        for row, expected in zip(self.rows, self.logits, strict=True):
            found = _centred(other(row.input_ids))
            squares[0] += (found - expected).square().sum(dtype=torch.float64)
            squares[1] += expected.square().sum(dtype=torch.float64)
            largest = max(largest, float((found - expected).abs().max()))
            log_p, log_q = expected.log_softmax(1), found.log_softmax(1)
            kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            agreed += float((log_p.argmax(1) == log_q.argmax(1)).sum())
            positions += len(expected)
            labels = torch.tensor(row.labels[1:])
            taken = (labels != IGNORE).nonzero()[:, 0]
            lost -= float(log_q[taken, labels[taken]].sum(dtype=torch.float64))
            supervised += len(taken)
        return {
            "logit_error": float((squares[0] / squares[1]).sqrt()),
            "kl": max(0.0, kl) / positions,
            "top1_agreement": agreed / positions,
            "max_logit_difference": largest,
            "loss": lost / supervised,
        }


def _centred(logits: Tensor) -> Tensor:
    """fp32 logits (T, vocabulary) of what follows each token but the last."""
    numbers = logits[:-1].float()
    return numbers - numbers.mean(1, keepdim=True)

"""How far what a reader gives is from the model as trained, on the same tokens.

Both give a distribution for every token of some rows; what is reported is the mean
Kullback-Leibler divergence (nats a token), the share of tokens whose likeliest next token agrees,
and the largest difference of a logit. A reader gives its logits in pieces, some positions of a row
at a time, in any order; of the model as trained what the decoder gives the head is kept, and the
logits of the same positions are made from it. So never all logits are there.

The logits are compared on the device of the trained model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.decoder import hidden_states, logits_of
from qlora_kit.data.batch import Batch, eval_batches
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError, NumericError
from qlora_kit.training.attention import within_rows
from qlora_kit.training.loss import to_device

TOKEN_LIMIT = 4096
"""Tokens that are compared; each needs the logits of both models."""
AT_ONCE = 2**23
"""Logits of each model at once: some five fp32 tensors of this size are there."""


@dataclass(frozen=True)
class Piece:
    """Logits that a reader gives: for the positions of a row from `start` on, (n, vocabulary)."""

    row: int
    start: int
    logits: Tensor


@dataclass(frozen=True)
class Verification:
    """The distance of an export over `tokens` tokens."""

    kl: float
    top1_agreement: float
    max_logit_difference: float
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """For export.json."""
        return asdict(self)


class Decoded:
    """What the decoder of a model gives its head on some rows, and the logits made from it.

    The model runs once, in evaluation mode; the positions of a row are those that precede a token
    of it.
    """

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        self._model = model.eval()
        self.rows: list[list[int]] = []
        """The token ids of each row."""
        self._hidden: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                ids, counts = batch["input_ids"], batch["lengths"]
                self.rows += [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]
                self._hidden += _hidden(model, batch)
        self.step = max(1, AT_ONCE // model.get_output_embeddings().out_features)
        """Positions whose logits are there at once."""

    def logits(self, row: int, start: int, stop: int) -> Tensor:
        """fp32 logits, through the head, its factor and its soft cap."""
        return logits_of(self._model, self._hidden[row][start:stop])

    def pieces(self) -> Iterator[Piece]:
        """All logits, piece by piece."""
        for row, hidden in enumerate(self._hidden):
            for start in range(0, len(hidden), self.step):
                yield Piece(row, start, self.logits(row, start, start + self.step))


def decoded(model: Any, rows: Sequence[Encoded], pad_id: int) -> Decoded:
    """What is compared of some rows: the first ones, up to enough tokens, in few batches.

    As few as can be: a model that is read layer by layer reads all files for each.
    """
    made = eval_batches(rows, max(1, len(rows)), pad_id, TOKEN_LIMIT)
    return Decoded(model, list(_enough(made)))


@torch.no_grad()
def compare(trained: Decoded, pieces: Iterable[Piece], *, normalized: bool = False) -> Verification:
    """The distance of what a reader gives from the model as trained.

    KL is of the reader's distribution from the trained model's.
    `normalized`: the reader gives log-probabilities, and so the logits are taken.
    Errors: `ExportError` for a reader with another vocabulary.
    """
    # On the device, where nothing waits for them: divergence, agreement, the largest difference.
    sums, tokens = None, 0
    for piece in pieces:
        for start in range(0, len(piece.logits), trained.step):
            other = piece.logits[start : start + trained.step]
            first = piece.start + start
            p = trained.logits(piece.row, first, first + len(other))
            if p.shape != other.shape:
                raise ExportError(
                    f"the export has logits for {other.shape[1]} tokens, the model as trained for "
                    f"{p.shape[1]}",
                    "nothing was written; report this with the command and the model",
                )
            q = other.to(p.device, torch.float32)
            log_p, log_q = p.log_softmax(1), q.log_softmax(1)
            if sums is None:
                sums = torch.zeros(3, dtype=torch.float64, device=p.device)
            sums[0] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
            sums[1] += (p.argmax(1) == q.argmax(1)).sum()
            apart = log_p - log_q if normalized else p - q
            sums[2] = torch.maximum(sums[2], apart.abs().max())
            tokens += len(other)
    assert sums is not None
    kl, agreed, largest = sums.tolist()
    # Rounding can leave a divergence of nothing a hair below zero; no number stays none.
    return Verification(0.0 if kl < 0 else kl / tokens, agreed / tokens, largest, tokens)


def check_distance(kl: float, limit: float | None, closer: str, reader: str | None = None) -> None:
    """Refuse an export that is too far from the model as trained. Errors: `NumericError`."""
    if math.isfinite(kl) and (limit is None or kl <= limit):
        return
    said = f"above --max_kl {limit:g}" if math.isfinite(kl) else "which is no number"
    by = "" if reader is None else f" as {reader} reads it"
    raise NumericError(
        f"the export{by} is {kl:.3g} nats a token from the model as trained, {said}; "
        "nothing was written",
        f"{closer}, or allow more with --max_kl",
    )


def _enough(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first batches, up to the one with which enough tokens are compared."""
    tokens = 0
    for batch in batches:
        yield batch
        tokens += sum(count - 1 for count in batch["lengths"])
        if tokens >= TOKEN_LIMIT:
            return


def _hidden(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """(n, h) for each row of a batch: at the positions whose next token is one of the row's own."""
    device = model.device
    moved = to_device(batch, device)
    with within_rows(model, moved) as rows:
        hidden = hidden_states(model, moved["input_ids"], moved["position_ids"], **rows)
    # A copy: the states of the padding are not kept.
    return [one[: count - 1].clone() for one, count in zip(hidden, batch["lengths"], strict=True)]

"""Rows to batches: padding, and the order in which rows come.

A step takes a window of micro-batches. Windows do not cross the end of an epoch, so that each
epoch sees every row once; the last window of an epoch is short where the rows do not fill it.
The order depends on the seed and the epoch alone, so that a resumed run goes on where it was.

There is no attention mask: rows are padded on the right and attention is causal, so that no real
token sees a padded one, and padded positions are in no loss. Left out: packing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from qlora_kit.data.prompt import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LENGTH_MULTIPLE = 16
"""Matrix units like such lengths, and a CPU library keeps a compiled kernel for each length."""


class Batch(TypedDict):
    """One micro-batch of B rows, padded to T tokens; all int64.

    T is the longest row's length, rounded up to a multiple of `LENGTH_MULTIPLE`.
    """

    input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T), -100 where nothing is trained on, padding included"""
    position_ids: Tensor
    """(B, T), 0 .. T - 1 in each row"""
    supervised: Tensor
    """(N,), flat indices b * T + t of the positions whose next token is trained on"""
    num_supervised: int
    """N, known without reading the device"""
    lengths: list[int]
    """tokens of each row, padding left out"""


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch of `rows`, in their order; needs at least one row."""
    longest = max(len(row.input_ids) for row in rows)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    # The output at t predicts the token at t + 1; the last position predicts nothing.
    predicts = torch.zeros((len(rows), length), dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    supervised = predicts.flatten().nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(length).expand(len(rows), -1).contiguous(),
        supervised=supervised,
        num_supervised=len(supervised),
        lengths=[len(row.input_ids) for row in rows],
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are padded with: the pad token, else EOS, else 0; no loss and no token sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def steps(
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    accumulation: int,
    num_steps: int,
    seed: int,
    pad_id: int,
    start_step: int = 0,
) -> Iterator[list[Batch]]:
    """The windows of optimizer steps `start_step` .. `num_steps` - 1, epoch after epoch.

    What is skipped is neither collated nor looked at.
    """
    per_epoch = steps_per_epoch(len(rows), batch_size, accumulation)
    window = batch_size * accumulation
    current, order = -1, list[int]()
    for step in range(start_step, num_steps):
        epoch, index = divmod(step, per_epoch)
        if epoch != current:
            current, order = epoch, epoch_order(len(rows), seed, epoch)
        chosen = [rows[i] for i in order[index * window : (index + 1) * window]]
        yield [
            collate(chosen[first : first + batch_size], pad_id)
            for first in range(0, len(chosen), batch_size)
        ]


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(num_rows)` that depends on the seed and the epoch alone."""
    # `random()` is the one method whose sequence Python keeps the same between versions.
    generator = random.Random(f"order {seed} {epoch}")
    keys = [generator.random() for _ in range(num_rows)]
    return sorted(range(num_rows), key=keys.__getitem__)


def steps_per_epoch(num_rows: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps that see every row once; the last may be short."""
    return math.ceil(num_rows / (batch_size * accumulation))


def num_steps(
    num_rows: int,
    batch_size: int,
    accumulation: int,
    num_train_epochs: float,
    max_steps: int | None,
) -> int:
    """Optimizer steps of a run, at least 1: `max_steps` where given, else that many epochs."""
    if max_steps is not None:
        return max(1, max_steps)
    # 1.1 * 50 is a little above 55 in floating point and must not become 56.
    exact = num_train_epochs * steps_per_epoch(num_rows, batch_size, accumulation)
    return max(1, math.ceil(round(exact, 6)))


def eval_batches(rows: Sequence[Encoded], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, shortest first: rows of like length waste little padding."""
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    for first in range(0, len(by_length), batch_size):
        yield collate(by_length[first : first + batch_size], pad_id)

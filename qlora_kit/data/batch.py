"""Rows to batches: padding, packing, and the windows of optimizer steps.

A step takes a window of micro-batches. Windows do not cross the end of an epoch, so that each
epoch sees every row once; the last window of an epoch is short where the rows do not fill it.

There is no attention mask: rows are padded on the right and attention is causal, so that no real
token sees a padded one, and padded positions are in no loss. Rows of a pack are told apart by
`position_ids`, which begin at 0 with each: that is what attention isolates them by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from qlora_kit.config.data import DEFAULT_LENGTH, DataConfig
from qlora_kit.data.order import Packs, epoch_order, grouped_order, make_packs
from qlora_kit.data.token_rows import TokenRows
from qlora_kit.data.tokens import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LENGTH_MULTIPLE = 16
"""Matrix units like such lengths, and a CPU library keeps a compiled kernel for each length."""


class Batch(TypedDict):
    """One micro-batch of B sequences, padded to T tokens; all int64.

    T is the longest sequence's length, rounded up to a multiple of `LENGTH_MULTIPLE`.
    """

    input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T), -100 where nothing is trained on, padding included"""
    position_ids: Tensor
    """(B, T), counted from 0 in each row of a sequence; the padding of a pack counts on its own"""
    supervised: Tensor
    """(N,), flat indices b * T + t of the positions whose next token is trained on"""
    num_supervised: int
    """N, known without reading the device"""
    lengths: list[int]
    """tokens of each sequence, padding left out"""


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch of `rows`, in their order; needs at least one row."""
    return collate_packs([[row] for row in rows], pad_id)


def collate_packs(packs: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """One batch whose sequences are the rows of each pack, one after the other."""
    lengths = [sum(len(row.input_ids) for row in pack) for pack in packs]
    width = padded(max(lengths))
    input_ids = torch.full((len(packs), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(packs), width), IGNORE, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(packs), 1)
    for index, pack in enumerate(packs):
        done = 0
        for row in pack:
            until = done + len(row.input_ids)
            input_ids[index, done:until] = torch.tensor(row.input_ids)
            # What a row begins with is predicted by nothing, least of all by the row before.
            labels[index, done + 1 : until] = torch.tensor(row.labels[1:])
            position_ids[index, done:until] = torch.arange(until - done)
            done = until
        if len(pack) > 1:
            position_ids[index, done:] = torch.arange(width - done)
    supervised = _predicting(labels)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        supervised=supervised,
        num_supervised=len(supervised),
        lengths=lengths,
    )


def padded(length: int) -> int:
    """The width of a batch whose longest sequence has `length` tokens."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def padding_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What is said of a tokenizer without a pad token, or with one that also ends a turn."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return None
    how = "no pad token: padding with" if pad is None else "the pad token is also"
    end = "EOS" if eos is not None else f"token {padding_id(tokenizer)}"
    return f"{how} {end}; padding is never trained on, and every end of a turn is"


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
    packs: Packs | None = None,
    group_by_length: bool = False,
) -> Iterator[list[Batch]]:
    """The windows of optimizer steps `start_step` .. `num_steps` - 1, epoch after epoch.

    With `packs` a batch has `batch_size` packs. What is skipped is neither collated nor looked at.
    """
    order = StepOrder(rows, batch_size, accumulation, seed, packs, group_by_length)
    for step in range(start_step, num_steps):
        groups = order.of_step(step)
        yield [
            collate_packs([[rows[i] for i in group] for group in part], pad_id)
            for first in range(0, len(groups), batch_size)
            if (part := groups[first : first + batch_size])
        ]


def step_rows(
    rows: Sequence[Encoded],
    step: int,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    packs: Packs | None = None,
    group_by_length: bool = False,
) -> list[int]:
    """Which rows the window of one step of `steps` holds, in their order."""
    order = StepOrder(rows, batch_size, accumulation, seed, packs, group_by_length)
    return [row for group in order.of_step(step) for row in group]


class StepOrder:
    """Which rows share a sequence of a step, from its number alone; keeps the epoch's order.

    A sequence is a row or, with `packs`, a pack. A step has `window` sequences, an epoch `count`;
    the last step of an epoch has what is left.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        batch_size: int,
        accumulation: int,
        seed: int,
        packs: Packs | None,
        group_by_length: bool,
    ) -> None:
        self._lengths = lengths_of(rows) if group_by_length else None
        self._packs, self._batch_size, self._seed = packs, batch_size, seed
        self.window = batch_size * accumulation
        self.count = len(rows) if packs is None else len(packs)
        self._epoch, self._order = -1, np.empty(0, np.int32)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once."""
        return -(-self.count // self.window)

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Every sequence of an epoch in its order; do not write to it."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = (
                epoch_order(self.count, self._seed, epoch)
                if self._lengths is None
                else grouped_order(self._lengths, self._batch_size, self.window, self._seed, epoch)
            )
        return self._order

    def of_step(self, step: int) -> list[list[int]]:
        """The rows of each sequence of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self.of_epoch(epoch)[index * self.window : (index + 1) * self.window]
        return self.rows_of(chosen)

    def rows_of(self, sequences: np.ndarray) -> list[list[int]]:
        """The rows of each of some sequences."""
        chosen: list[int] = sequences.tolist()
        return [[i] for i in chosen] if self._packs is None else [self._packs[i] for i in chosen]


def split(batch: Batch, max_rows: int) -> Iterator[Batch]:
    """The same sequences in batches of at most `max_rows`, each as wide as it has to be."""
    for first in range(0, len(batch["lengths"]), max_rows):
        lengths = batch["lengths"][first : first + max_rows]
        rows, width = slice(first, first + max_rows), padded(max(lengths))
        labels = batch["labels"][rows, :width]
        supervised = _predicting(labels)
        yield Batch(
            input_ids=batch["input_ids"][rows, :width].contiguous(),
            labels=labels.contiguous(),
            position_ids=batch["position_ids"][rows, :width].contiguous(),
            supervised=supervised,
            num_supervised=len(supervised),
            lengths=lengths,
        )


def _predicting(labels: Tensor) -> Tensor:
    """Flat indices of the positions whose next token is trained on; the last predicts nothing."""
    predicts = torch.zeros(labels.shape, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    return predicts.flatten().nonzero().squeeze(1)


def pack(config: DataConfig, rows: Sequence[Encoded], seed: int) -> Packs | None:
    """Which rows share a sequence of `max_length` tokens; None without `packing`."""
    if not config.packing:
        return None
    return make_packs(lengths_of(rows), config.max_length or DEFAULT_LENGTH, seed)


def lengths_of(rows: Sequence[Encoded]) -> np.ndarray:
    """The tokens of each row, as int32, without reading rows that are on disk."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32)


def padding_share(sequences: Sequence[int], batch_size: int) -> float:
    """The share of padding where sequences of these lengths come in batches in this order."""
    total = sum(
        padded(max(part)) * len(part)
        for first in range(0, len(sequences), batch_size)
        if (part := sequences[first : first + batch_size])
    )
    return 1 - sum(sequences) / total if total else 0.0


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


def eval_batches(
    rows: Sequence[Encoded], batch_size: int, pad_id: int, most_tokens: int | None = None
) -> Iterator[Batch]:
    """Every row once, shortest first: rows of like length waste little padding.

    Batches of several rows have at most `most_tokens` tokens, padding included.
    """
    lengths = lengths_of(rows)
    order = np.argsort(lengths, kind="stable").tolist()
    chosen: list[int] = []
    for row in order:
        size = (len(chosen) + 1) * padded(int(lengths[row]))
        full = len(chosen) == batch_size or (most_tokens is not None and size > most_tokens)
        if chosen and full:
            yield collate([rows[i] for i in chosen], pad_id)
            chosen = []
        chosen.append(row)
    if chosen:
        yield collate([rows[i] for i in chosen], pad_id)

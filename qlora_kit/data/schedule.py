"""The steps of a run: which rows each has, in which micro-batches, and which one is the largest.

A step takes up to `accumulation` micro-batches of `batch_size` sequences; a sequence is a row, a
pack of rows, or a pair of them: two rows of the batch. Steps do not cross the end of an epoch, so
that each epoch sees every row once; the last step of an epoch has what is left. The n-th step is a
function of n, so that a checkpoint keeps the number of steps done and nothing else.

A micro-batch is as large as its padded tokens: sequences x width. The largest is found with numpy
from lengths and order, epoch by epoch, before a batch is made, and no further than the first epoch
that has one as large as any can be, which is nearly always the first whole one. Of equally large
micro-batches the one with the most supervised tokens counts, as far as that takes few rows to be
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from qlora_kit.config.data import DEFAULT_LENGTH, DataConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import (
    LENGTH_MULTIPLE,
    PAIR,
    Batch,
    collate_packs,
    collate_pairs,
    lengths_of,
)
from qlora_kit.data.order import Packs, epoch_order, grouped_order, make_packs
from qlora_kit.data.tokens import IGNORE, Encoded

READ_ROWS = 4096
"""Rows that are read at most to compare equally large batches; the first batch always is."""

LOOKED_AT = 2**22
"""Packs of all epochs that are looked at, a few seconds' worth."""


class Largest(NamedTuple):
    """The largest micro-batch of some steps: its step, counted from 1, and its rows by sequence."""

    step: int
    sequences: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The micro-batches of steps `start_step` + 1 .. `num_steps`, epoch after epoch.

    With `packs` a batch has `batch_size` packs, with `pairs` as many pairs of neighbours. The
    reference gives rows of pairs the log-probabilities `reference`, zeros until they are known.
    Iterating gives the micro-batches of each step; what `start_step` skips is not looked at.
    """

    rows: Sequence[Encoded]
    batch_size: int
    num_steps: int
    seed: int
    accumulation: int = 1
    pad_id: int = 0
    packs: Packs | None = None
    pairs: bool = False
    reference: torch.Tensor | None = None
    group_by_length: bool = False
    start_step: int = 0

    @staticmethod
    def of_run(
        rows: Sequence[Encoded], data: DataConfig, training: TrainingConfig, pad_id: int
    ) -> StepSchedule:
        """Every step of a run with these options, at least 1."""
        packs = None
        if data.packing:
            capacity = data.max_length or DEFAULT_LENGTH
            packs = make_packs(lengths_of(rows), capacity, training.seed)
        schedule = StepSchedule(
            rows=rows,
            batch_size=training.rows,
            num_steps=training.max_steps or 1,
            seed=training.seed,
            accumulation=training.gradient_accumulation_steps,
            pad_id=pad_id,
            packs=packs,
            pairs=training.pairs,
            group_by_length=data.group_by_length,
        )
        if training.max_steps is not None:
            return schedule
        # 1.1 * 50 is a little above 55 in floating point and must not become 56.
        exact = round(training.num_train_epochs * schedule.steps_per_epoch, 6)
        return replace(schedule, num_steps=max(1, math.ceil(exact)))

    @property
    def num_sequences(self) -> int:
        """The rows of an epoch, or its packs or pairs."""
        return len(self.rows if self.packs is None else self.packs) // self.rows_each

    @property
    def rows_each(self) -> int:
        """Rows of a batch that a sequence is."""
        return PAIR if self.pairs else 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once; the last may be short."""
        return -(-self.num_sequences // self._per_step)

    def after(self, step: int) -> StepSchedule:
        """The steps that are left after step `step`, counted from 1."""
        return replace(self, start_step=step)

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        for of_step in self.sequences():
            yield [self.collate(sequences) for sequences in of_step]

    def sequences(self) -> Iterator[list[list[list[int]]]]:
        """Of each step the sequences of its micro-batches, each a list of rows."""
        for _, chosen in self._epochs():
            for first in range(0, len(chosen), self._per_step):
                of_step = chosen[first : first + self._per_step]
                yield [
                    self._rows_of(of_step[start : start + self.batch_size])
                    for start in range(0, len(of_step), self.batch_size)
                ]

    def collate(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """The micro-batch of some sequences, each a list of rows."""
        if self.pairs:
            rows = [row for pair in sequences for row in pair]
            reference = torch.zeros(len(rows)) if self.reference is None else self.reference[rows]
            return collate_pairs([self.rows[row] for row in rows], reference, self.pad_id)
        return collate_packs([[self.rows[i] for i in one] for one in sequences], self.pad_id)

    def rows_of(self, step: int) -> list[int]:
        """The rows of one step, counted from 1, in their order; of pairs their places."""
        (of_step,) = replace(self, start_step=step - 1, num_steps=step).sequences()
        rows = [row for batch in of_step for sequence in batch for row in sequence]
        return [row // PAIR for row in rows[::PAIR]] if self.pairs else rows

    def in_batches_of(self, rows: int) -> StepSchedule:
        """The same steps in micro-batches of so many sequences, a divisor of a step's."""
        return replace(self, batch_size=rows, accumulation=self._per_step // rows)

    def mean_width(self) -> int:
        """The tokens of a row in the batches of the first epoch, padding included."""
        return -(-int(self._sizes(self._order(0)).sum()) // self.num_sequences)

    def padding_share(self) -> float:
        """The share of padding in the batches of the first epoch."""
        total = self.rows_each * int(self._sizes(self._order(0)).sum())
        return 1 - int(lengths_of(self.rows).sum(dtype=np.int64)) / total if total else 0.0

    def largest(self) -> Largest | None:
        """The largest micro-batch of these steps; None where there are no steps."""
        most = min(self.batch_size, self.num_sequences) * int(self._widths.max(initial=0))
        best, found = 0, list[Largest]()
        for step, sequences in self._epochs():
            sizes = self._sizes(sequences)
            size = int(sizes.max())
            if size < best:
                continue
            if size > best:
                best, found = size, []
            starts = np.flatnonzero(sizes == size)[: READ_ROWS - len(found)] * self.batch_size
            for start in starts.tolist():
                rows = self._rows_of(sequences[start : start + self.batch_size])
                found.append(Largest(step + start // self._per_step + 1, rows))
            if best == most:
                break
        return self._most_supervised_of(found)

    def most_single_rows(self) -> int:
        """The most packs of one micro-batch each of which is a single row; 0 without packs.

        Such a batch is one of rows. Of a long run not all epochs are looked at; the answer is then
        as high as it can be.
        """
        if self.packs is None:
            return 0
        single = _is_single(self.packs)
        bound, best, looked = min(self.batch_size, int(single.sum())), 0, 0
        for _, sequences in self._epochs():
            if best == bound:
                break
            if (looked := looked + len(sequences)) > LOOKED_AT:
                return bound
            first = np.arange(0, len(sequences), self.batch_size)
            alone = np.logical_and.reduceat(single[sequences], first)
            counts = np.minimum(self.batch_size, len(sequences) - first)
            best = max(best, int((alone * counts).max()))
        return best

    def has_single_rows(self) -> bool:
        """Whether a pack is a single row."""
        return self.packs is not None and bool(_is_single(self.packs).any())

    def most_supervised(self, length: int) -> int:
        """The most supervised tokens of a sequence; `length` at most, and where rows are many."""
        if len(self.rows) > READ_ROWS:
            return length
        counts = np.array([_supervised(row) for row in self.rows])
        if self.packs is not None:
            counts = np.array([counts[rows].sum() for rows in self.packs])
        return min(length, int(counts.max()))

    @property
    def _per_step(self) -> int:
        """Sequences of a step."""
        return self.batch_size * self.accumulation

    @cached_property
    def _lengths(self) -> np.ndarray:
        """The tokens of each row, or of the longer one of each pair."""
        lengths = lengths_of(self.rows)
        return lengths.reshape(-1, PAIR).max(1) if self.pairs else lengths

    @cached_property
    def _widths(self) -> np.ndarray:
        """The tokens of a row of each sequence, padded as if it were a batch of its own."""
        lengths = self._lengths.astype(np.int64)
        if self.packs is not None:
            packed = np.cumsum(lengths[self.packs.rows])
            lengths = np.diff(packed[self.packs.ends - 1], prepend=0)
        return -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE

    def _order(self, epoch: int) -> np.ndarray:
        """Every sequence of an epoch, in its order."""
        if not self.group_by_length:
            return epoch_order(self.num_sequences, self.seed, epoch)
        return grouped_order(self._lengths, self.batch_size, self._per_step, self.seed, epoch)

    def _epochs(self) -> Iterator[tuple[int, np.ndarray]]:
        """What each epoch has of these steps: the number of steps before it, and its sequences."""
        step = self.start_step
        while step < self.num_steps:
            epoch, index = divmod(step, self.steps_per_epoch)
            until = min(self.steps_per_epoch, index + self.num_steps - step)
            yield step, self._order(epoch)[index * self._per_step : until * self._per_step]
            step += until - index

    def _rows_of(self, sequences: np.ndarray) -> list[list[int]]:
        """The rows of each of some sequences."""
        chosen: list[int] = sequences.tolist()
        if self.pairs:
            return [[PAIR * pair, PAIR * pair + 1] for pair in chosen]
        return [[i] for i in chosen] if self.packs is None else [self.packs[i] for i in chosen]

    def _sizes(self, sequences: np.ndarray) -> np.ndarray:
        """The padded tokens of each micro-batch of some sequences, of pairs those of a side."""
        first = np.arange(0, len(sequences), self.batch_size)
        counts: np.ndarray = np.minimum(self.batch_size, len(sequences) - first)
        return counts * np.maximum.reduceat(self._widths[sequences], first)

    def _most_supervised_of(self, found: Sequence[Largest]) -> Largest | None:
        best, most, read = None, -1, 0
        for one in found:
            chosen = [row for rows in one.sequences for row in rows]
            if best is not None and read + len(chosen) > READ_ROWS:
                break
            read += len(chosen)
            supervised = sum(_supervised(self.rows[row]) for row in chosen)
            if supervised > most:
                best, most = one, supervised
        return best


def _is_single(packs: Packs) -> np.ndarray:
    single: np.ndarray = np.diff(packs.ends, prepend=0) == 1
    return single


def _supervised(row: Encoded) -> int:
    # What a row begins with is predicted by nothing.
    return sum(label != IGNORE for label in row.labels[1:])


def padding_shares(
    rows: Sequence[Encoded], batch_size: int, capacity: int, seed: int, pairs: bool = False
) -> tuple[dict[str, float], int]:
    """The share of padding in batches of rows in each order, and the number of packs.

    Pairs are not packed.
    """
    schedule = StepSchedule(rows=rows, batch_size=batch_size, num_steps=1, seed=seed, pairs=pairs)
    orders = {"random": schedule, "by length": replace(schedule, group_by_length=True)}
    num_packs = 0
    if not pairs:
        packs = make_packs(lengths_of(rows), capacity, seed)
        num_packs, orders["packed"] = len(packs), replace(schedule, packs=packs)
    return {name: order.padding_share() for name, order in orders.items()}, num_packs

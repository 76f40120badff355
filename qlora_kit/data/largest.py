"""The largest micro-batch of a run, found from lengths and order, before a batch is made.

A micro-batch is as large as its padded tokens: sequences x width. Whole epochs are looked at with
numpy, one after the other, and no further than the first that has a batch as large as any can be,
which is nearly always the first whole one. Of equally large batches the one with the most
supervised tokens counts, as far as that takes few rows to be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_kit.data.batch import LENGTH_MULTIPLE, Batch, StepOrder, collate_packs, lengths_of
from qlora_kit.data.order import Packs
from qlora_kit.data.tokens import IGNORE, Encoded

READ_ROWS = 4096
"""Rows that are read at most to compare equally large batches; the first batch always is."""

LOOKED_AT = 2**22
"""Packs of all epochs that are looked at, a few seconds' worth."""


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of a run, in its step counted from 1; `rows` of each sequence."""

    step: int
    rows: tuple[tuple[int, ...], ...]

    def batch(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """The micro-batch as the step has it."""
        return collate_packs([[rows[i] for i in group] for group in self.rows], pad_id)


def largest_batch(
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    accumulation: int,
    num_steps: int,
    seed: int,
    start_step: int = 0,
    packs: Packs | None = None,
    group_by_length: bool = False,
) -> Largest | None:
    """The largest of the micro-batches that `data.batch.steps` gives for the same arguments.

    None where there are no steps.
    """
    order = StepOrder(rows, batch_size, accumulation, seed, packs, group_by_length)
    lengths = _sequence_lengths(rows, packs)
    lengths = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    most = min(batch_size, order.count) * int(lengths.max(initial=0))
    best, found = 0, list[Largest]()
    for step, sequences in _epochs(order, start_step, num_steps):
        first = np.arange(0, len(sequences), batch_size)
        widths = np.maximum.reduceat(lengths[sequences], first)
        sizes = widths * np.minimum(batch_size, len(sequences) - first)
        largest = int(sizes.max())
        if largest < best:
            continue
        if largest > best:
            best, found = largest, []
        for start in first[sizes == largest][: READ_ROWS - len(found)].tolist():
            groups = order.rows_of(sequences[start : start + batch_size])
            found.append(Largest(step + start // order.window + 1, tuple(map(tuple, groups))))
        if best == most:
            break
    return _most_supervised(rows, found)


def most_alone(
    rows: Sequence[Encoded],
    packs: Packs,
    *,
    batch_size: int,
    accumulation: int,
    num_steps: int,
    seed: int,
    group_by_length: bool = False,
) -> int:
    """The most packs of one micro-batch each of which is a single row.

    Such a batch is one of rows. Of a long run not all epochs are looked at; the answer is then as
    high as it can be.
    """
    single = np.diff(packs.ends, prepend=0) == 1
    bound, best, looked = min(batch_size, int(single.sum())), 0, 0
    order = StepOrder(rows, batch_size, accumulation, seed, packs, group_by_length)
    for _, sequences in _epochs(order, 0, num_steps):
        if best == bound:
            break
        if (looked := looked + len(sequences)) > LOOKED_AT:
            return bound
        first = np.arange(0, len(sequences), batch_size)
        alone = np.logical_and.reduceat(single[sequences], first)
        sizes = np.minimum(batch_size, len(sequences) - first)
        best = max(best, int((alone * sizes).max()))
    return best


def most_supervised(rows: Sequence[Encoded], packs: Packs | None, length: int) -> int:
    """The most tokens of one sequence that are trained on; `length` where rows are too many."""
    if len(rows) > READ_ROWS:
        return length
    counts = np.array([_supervised(row) for row in rows])
    if packs is not None:
        counts = np.array([counts[packs[number]].sum() for number in range(len(packs))])
    return min(length, int(counts.max()))


def _supervised(row: Encoded) -> int:
    return sum(label != IGNORE for label in row.labels[1:])


def _epochs(order: StepOrder, start_step: int, num_steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """What each epoch shows of some steps: its first step of them, and their sequences."""
    step = start_step
    while step < num_steps:
        epoch, index = divmod(step, order.steps_per_epoch)
        until = min(order.steps_per_epoch, index + num_steps - step)
        yield step, order.of_epoch(epoch)[index * order.window : until * order.window]
        step += until - index


def _sequence_lengths(rows: Sequence[Encoded], packs: Packs | None) -> np.ndarray:
    """Tokens of each row, or of each pack."""
    lengths = lengths_of(rows).astype(np.int64)
    if packs is None:
        return lengths
    first = np.concatenate([[0], packs.ends[:-1]])
    return np.add.reduceat(lengths[packs.rows], first)


def _most_supervised(rows: Sequence[Encoded], found: Sequence[Largest]) -> Largest | None:
    best, most, read = None, -1, 0
    for one in found:
        chosen = [i for group in one.rows for i in group]
        if best is not None and read + len(chosen) > READ_ROWS:
            break
        read += len(chosen)
        # What a row begins with is predicted by nothing.
        supervised = sum(_supervised(rows[i]) for i in chosen)
        if supervised > most:
            best, most = one, supervised
    return best

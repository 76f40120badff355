"""The order in which rows come, and which rows share a pack; both from seed and epoch alone.

- random: a permutation of the rows for each epoch.
- by length: a permutation, cut into groups of 50 steps' rows; each is sorted by length and cut into
  batches, and the batches of the epoch are shuffled. Padding is small, the order still random.
- packs: rows that together fill `max_length`, best fit in the order of falling length, ties by the
  seed; the packs stay the same from epoch to epoch and come in a permutation for each.

The n-th step of a run is therefore a function of n: a checkpoint keeps the step, nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SORTED_STEPS = 50
"""Steps whose rows are sorted by length together; more leave less padding and less chance."""


@dataclass(frozen=True)
class Packs(Sequence[list[int]]):
    """Which rows share a sequence; item i lists the rows of pack i, in their order in it."""

    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        end = self.ends[index]
        first = self.ends[index - 1] if index else 0
        packed: list[int] = self.rows[first:end].tolist()
        return packed


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(num_rows)` that depends on the seed and the epoch alone."""
    return permutation(num_rows, f"order {seed} {epoch}")


def grouped_order(
    lengths: np.ndarray, batch_size: int, per_step: int, seed: int, epoch: int
) -> np.ndarray:
    """A permutation in which every `batch_size` rows have like lengths; the short batch is last.

    A step has `per_step` rows.
    """
    order = permutation(len(lengths), f"order {seed} {epoch}")
    together = SORTED_STEPS * per_step
    for first in range(0, len(order), together):
        part = order[first : first + together]
        part[:] = part[np.argsort(-lengths[part], kind="stable")]
    whole = len(order) // batch_size
    batches = order[: whole * batch_size].reshape(whole, batch_size)
    batches = batches[permutation(whole, f"batches {seed} {epoch}")]
    return np.concatenate([batches.flatten(), order[whole * batch_size :]])


def make_packs(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Every row in one pack, no pack above `capacity` tokens; best fit, longest first.

    Errors: none; a row may not be longer than `capacity`.
    """
    shuffled = permutation(len(lengths), f"packs {seed}")
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    pack_of = np.empty(len(lengths), dtype=np.int32)
    # Open packs by the room they have left, and the rooms that there are as bits of one number.
    open_packs: dict[int, list[int]] = {}
    rooms = 0
    num_packs = 0
    for place, length in enumerate(_in_order(lengths, order)):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, num_packs
            num_packs += 1
        pack_of[place] = pack
        left = room - length
        if left > 0:
            open_packs.setdefault(left, []).append(pack)
            rooms |= 1 << left
    by_pack = np.argsort(pack_of, kind="stable")
    return Packs(order[by_pack], np.cumsum(np.bincount(pack_of, minlength=num_packs)))


def permutation(count: int, seed: str | int) -> np.ndarray:
    """A permutation of `range(count)` that depends on the seed alone, as int32."""
    # `random()` is the one method whose sequence Python keeps the same between versions.
    generator = random.Random(seed)
    keys = np.fromiter((generator.random() for _ in range(count)), np.float64, count)
    # Of rows there are fewer than 2**31, and half the bytes are much for many rows.
    return np.argsort(keys, kind="stable").astype(np.int32)


def _in_order(lengths: np.ndarray, order: np.ndarray) -> Iterator[int]:
    """The lengths as Python's numbers, not all of them at a time."""
    for first in range(0, len(order), 65536):
        yield from lengths[order[first : first + 65536]].tolist()

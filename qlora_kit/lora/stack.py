"""The adapters of a mix on one linear in one matrix, and what each row takes of it.

All A lie one below another (sum of r, in_features), and so do all B (sum of r, out_features),
whatever the ranks. Rows that go on together for several steps on a CPU get copies of their own A
and B in fp32 besides (`OwnRows`): a step then casts nothing and multiplies by no other row's. A
weighted sum of adapters on a linear is made by the same stacking.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.device.found import free_bytes
from qlora_kit.device.target import device_type
from qlora_kit.errors import AdapterError
from qlora_kit.lora.low_rank import Part
from qlora_kit.options.checks import LARGEST_ALPHA

FROM_STEP = 3
"""The step of the same rows in which their copies are made: that takes as long as three more."""
REPEATED = 2
"""Times the stack's numbers that rows may take as their own: rows with one adapter repeat it."""
APART = 2**10
"""Times the least of different scalings that their common factor may be: A x of fp16 times less
than its inverse would lose bits at the lower end."""
SPARE = 2**28
"""Bytes that copies leave free."""


@dataclass(frozen=True)
class Span:
    """Where an adapter lies among the ranks of a stack: `start` to `start + r`."""

    adapter: int
    start: int
    r: int
    scaling: float


@dataclass(frozen=True)
class Stack:
    """The adapters of one dtype on one linear: A (R + 1, in), B (R + 1, out), R the sum of ranks.

    The last row of each is zero: what ranks that a row does not have are taken from.
    """

    lora_a: Tensor
    lora_b: Tensor
    spans: tuple[Span, ...]
    layout: int
    """The number of `spans`: stacks of one layout have the same places for rows."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Part]], layouts: dict[tuple[Span, ...], int]) -> Stack:
        """From the parts of adapters, by their numbers in the mix."""
        downs = [part.weights[0].detach() for _, part in parts]
        ups = [part.weights[1].detach() for _, part in parts]
        ranks, dtype = [down.shape[0] for down in downs], parts[0][1].dtype
        lora_a = downs[0].new_zeros(sum(ranks) + 1, downs[0].shape[1], dtype=dtype)
        lora_b = ups[0].new_zeros(sum(ranks) + 1, ups[0].shape[0], dtype=dtype)
        spans, start = [], 0
        for (number, part), down, up, r in zip(parts, downs, ups, ranks, strict=True):
            lora_a[start : start + r].copy_(down)
            lora_b[start : start + r].copy_(up.t())
            spans.append(Span(number, start, r, part.scaling))
            start += r
        layout = layouts.setdefault(tuple(spans), len(layouts))
        return cls(lora_a, lora_b, tuple(spans), layout)

    def of_rows(self, places: Places, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (B, r, in) and B (B, r, out) of each row, in `dtype`."""
        a, b = (m.index_select(0, places.own).to(dtype) for m in (self.lora_a, self.lora_b))
        rows = places.foreign.shape[0]
        return a.view(rows, -1, a.shape[1]), b.view(rows, -1, b.shape[1])

    @property
    def nbytes(self) -> int:
        """Of both matrices."""
        return self.lora_a.nbytes + self.lora_b.nbytes


@dataclass(frozen=True)
class Places:
    """What the rows (B,) take of a stack whose ranks are R, of r at most.

    `foreign` (B, 1, R) is true where a rank is not the row's; `own` (B * r,) are the places of its
    ranks, or of the zero. `scaling` is the one of all, or the largest, and `scalings` (B, 1, 1) are
    then those of the rows in it: at most 1, for A x may only just be in the range of fp16, unless
    they are further than `APART` from each other.
    """

    foreign: Tensor
    own: Tensor
    scaling: float
    scalings: Tensor | None

    @classmethod
    def of(cls, stack: Stack, rows: Sequence[int]) -> Places | None:
        """For the number of each row's adapter, -1 for none; None where no row has any of these."""
        by_adapter = {span.adapter: span for span in stack.spans}
        found = [by_adapter.get(row) for row in rows]
        if not any(found):
            return None
        device, total = stack.lora_a.device, sum(span.r for span in stack.spans)
        widest = max(span.r for span in found if span is not None)
        foreign = torch.ones(len(rows), 1, total, dtype=torch.bool)
        own = torch.full((len(rows), widest), total)
        scalings = torch.zeros(len(rows), 1, 1)
        for row, span in enumerate(found):
            if span is not None:
                foreign[row, 0, span.start : span.start + span.r] = False
                own[row, : span.r] = torch.arange(span.start, span.start + span.r)
                scalings[row] = span.scaling
        different = {span.scaling for span in found if span is not None}
        one, shares = next(iter(different)), None
        if len(different) > 1:
            sizes = [abs(scaling) for scaling in different if scaling]
            one = min(max(sizes), APART * min(sizes))
            shares = (scalings / one).to(device)
        return cls(foreign.to(device), own.view(-1).to(device), one, shares)


@dataclass
class RowsRoom:
    """How many bytes rows may take as their own, in all mixes of a bank together: `most`.

    `nbytes` is what they take now.
    """

    most: int = 2**30
    nbytes: int = 0

    def has(self, needed: int, device: torch.device) -> bool:
        """Whether so many more may be taken."""
        return self.nbytes + needed <= self.most and needed + SPARE <= free_bytes(device)

    def take(self, owner: object, nbytes: int) -> None:
        """Count so many bytes for as long as `owner` lives."""
        self.nbytes += nbytes
        weakref.finalize(owner, self._give_back, nbytes).atexit = False

    def _give_back(self, nbytes: int) -> None:
        self.nbytes -= nbytes


class OwnRows:
    """A (B, r, in) and B (B, r, out) of each row, kept for the steps of rows that stay the same.

    They go with the mix, which is of just these rows. Where there is no room for them, where rows
    with one adapter would repeat it too often, and on CUDA, the stack is multiplied by. They are in
    fp32 whatever the adapters are in: of 32 rows with 32 adapters, too, a product of each row by
    its own takes 7 ms then, in bf16 9, and one by the stack in bf16 13 (28 linears of 160 M).
    """

    def __init__(self, stack: Stack, places: Places, room: RowsRoom) -> None:
        self._stack, self._places, self._room = stack, places, room
        self._steps = 0
        self._made: tuple[Tensor, Tensor] | None = None

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Those for tokens `x` of a step; None where the stack is to be multiplied by."""
        if self._made is None and device_type(x) == "cpu":
            self._steps += 1
            if self._steps == FROM_STEP and self._have_room(x.device):
                self._made = self._stack.of_rows(self._places, torch.float32)
                self._room.take(self, sum(one.nbytes for one in self._made))
        return self._made

    def _have_room(self, device: torch.device) -> bool:
        ranks, own = self._stack.lora_a.shape[0] - 1, self._places.own.numel()
        width = self._stack.lora_a.shape[1] + self._stack.lora_b.shape[1]
        needed = own * width * torch.float32.itemsize
        return own <= REPEATED * ranks and self._room.has(needed, device)


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse those of no sum. Errors: `AdapterError` for no finite numbers, and for all 0."""
    wrong = {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not abs(weight) <= LARGEST_ALPHA
    }
    if wrong or not any(weights.values()):
        said = str(wrong or dict(weights))[:100]
        raise AdapterError(
            f"the weights of a sum must be numbers, not all 0, got {said}",
            "give a weight for each adapter, such as {'a': 0.7, 'b': 0.3}",
        )


def weighted_sum(terms: Sequence[tuple[Part, float]]) -> Part:
    """One part whose update is the weighted sum of those of parts of one linear."""
    factors = [part.scaling * weight for part, weight in terms]
    # The largest is left to the matmul, and the others are taken by it: equal ones leave every B as
    # it is, and no B grows out of the range of its dtype.
    scaling = max(factors, key=abs)
    dtype = functools.reduce(torch.promote_types, (part.dtype for part, _ in terms))
    downs = [part.weights[0].to(dtype) for part, _ in terms]
    ups = [
        part.weights[1].float().mul(factor / scaling).to(dtype)
        for (part, _), factor in zip(terms, factors, strict=True)
    ]
    weights = torch.cat(downs, dim=0), torch.cat(ups, dim=1)  # (sum of r, in) and (out, sum of r)
    return Part(terms[0][0].base, weights, scaling, dtype)

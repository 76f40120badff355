"""Which decoder layers keep, and which recompute: the fastest mix of levels within a budget.

Bytes come from three traces, one for each level: what a layer adds in forward and takes at its
peak is the same beside layers of another level. The mix that this finds is traced itself before it
is taken. Layers that keep more are the last ones: their activations are the first to go, so that
the peak of backward sees the least of them.

Time is counted in the multiply-adds that backward does again; the products of a layer's linears and
of attention are all of it that matters.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_kit.config.training import RECOMPUTE_LEVELS
from qlora_kit.data.batch import Batch
from qlora_kit.memory.counter import Interval
from qlora_kit.plan.fake_run import FakeRun


@dataclass(frozen=True)
class Chosen:
    """Levels of the decoder layers, and the intervals of the passes with them."""

    levels: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once."""
        return max(interval.peak for interval in self.intervals)


def choose_levels(run: FakeRun, micro_batches: Sequence[Batch], budget: int | None) -> Chosen:
    """The levels with the least work whose passes stay within `budget` bytes of tensors.

    Without a budget all layers keep everything; where `full` does not fit all are `full`. On very
    short rows with large adapters and no accumulation that is not the least: `selective` may take
    some megabytes less.
    """
    count = len(run.layers)

    def traced(levels: Sequence[str]) -> Chosen:
        return Chosen(tuple(levels), tuple(run.passes(micro_batches, levels)))

    least = traced(["none"] * count)
    if budget is None or least.peak <= budget:
        return least
    most = traced(["full"] * count)
    if most.peak > budget:
        return most
    between = traced(["selective"] * count)
    ledger = _Ledger(run, {"none": least, "selective": between, "full": most})
    length = int(micro_batches[-1]["input_ids"].shape[1])
    work = {level: layer_work(run.layers[-1], level, length, run.own) for level in RECOMPUTE_LEVELS}
    mixes = []
    for keeping in range(count):
        # The largest number of selective layers that fits beside `keeping` others.
        fitting = bisect.bisect_right(
            range(count - keeping + 1),
            budget,
            key=lambda selective, keeping=keeping: ledger.peak(selective, keeping),  # type: ignore[misc]
        )
        if fitting:
            selective = fitting - 1
            again = work["selective"] * selective + work["full"] * (count - keeping - selective)
            mixes.append((again, keeping, selective))
    for _, keeping, selective in sorted(mixes):
        found = traced(_levels(count, selective, keeping))
        if found.peak <= budget:
            return found
    return most


def layer_work(layer: nn.Module, level: str, length: int, own: bool) -> int:
    """Multiply-adds a token that backward does again at a level, in rows of `length` tokens.

    `own` says whether the layer runs through a block of ours. See `training/recompute.py`.
    """
    if level == "none":
        return 0
    left_out = _left_out(layer, "down_proj")
    if level == "selective" and own:
        left_out += _left_out(layer, "o_proj")
    attention = 0 if level == "selective" else _attention_work(layer, length)
    return _products(layer) - left_out + attention


def recomputed_share(run: FakeRun, levels: Sequence[str], length: int) -> float:
    """The work that backward does again, of the forward pass through the decoder."""
    again = sum(
        layer_work(layer, level, length, run.own)
        for layer, level in zip(run.layers, levels, strict=True)
    )
    forward = sum(_products(layer) + _attention_work(layer, length) for layer in run.layers)
    return again / forward


class _Ledger:
    """The peak of any mix, from the traces of each level: bytes of what a layer adds and takes."""

    def __init__(self, run: FakeRun, traces: dict[str, Chosen]) -> None:
        self._count = len(run.layers)
        place = {name: number for number, name in enumerate(run.names)}
        self._start = traces["none"].intervals[0].start
        self._rows = [
            (
                place.get(intervals[0].module),
                {
                    level: (
                        interval.peak - run.total(interval.start),
                        run.total(interval.end) - run.total(interval.start),
                    )
                    for level, interval in zip(traces, intervals, strict=True)
                },
            )
            for intervals in zip(*(chosen.intervals for chosen in traces.values()), strict=True)
        ]
        self._begin = run.total(self._start)

    def peak(self, selective: int, keeping: int) -> int:
        levels = _levels(self._count, selective, keeping)
        now = peak = self._begin
        for layer, sizes in self._rows:
            over, added = sizes["none" if layer is None else levels[layer]]
            peak = max(peak, now + over)
            now += added
        return peak


def _levels(count: int, selective: int, keeping: int) -> list[str]:
    """All layers: those that recompute everything first, those that keep everything last."""
    full = count - selective - keeping
    return ["full"] * full + ["selective"] * selective + ["none"] * keeping


def _products(layer: nn.Module) -> int:
    """Weights of the linears of a layer, adapters left out."""
    linears = (module for module in layer.modules() if isinstance(module, nn.Linear))
    return sum(_size(linear) for linear in linears if not linear.weight.requires_grad)


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _left_out(layer: nn.Module, name: str) -> int:
    """The weights of a linear that ends what is replayed; 0 where a norm reads its output."""
    if hasattr(layer, "post_feedforward_layernorm"):
        return 0
    linear = next((m for found, m in layer.named_modules() if found.endswith(f".{name}")), None)
    base = getattr(linear, "base_layer", linear)
    return _size(base) if isinstance(base, nn.Linear) else 0


def _attention_work(layer: Any, length: int) -> int:
    """Scores and sums over values of one token, causal: half of all positions, twice."""
    attention = getattr(layer, "self_attn", None)
    output = getattr(attention, "o_proj", None)
    return 0 if output is None else int(length * output.in_features)

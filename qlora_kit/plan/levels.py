"""Which decoder layers keep, and which recompute: the fastest mix of levels within a budget.

Layers that keep more are the last ones: backward frees their activations first, so that its peak
sees the least of them. A mix is thus two numbers, how many layers are `selective` and how many keep
everything, and a model of n layers has about n^2 / 2 mixes: too many to trace each. `_Ledger`
computes their peaks from three traces. The mix that is found is traced itself before it is taken,
so that a plan never rests on the ledger alone.

Time is that of the card, where it is known: each layer's forward and backward at each level, read
off the three traces (`step_time.py`). Elsewhere it is the multiply-adds that backward recomputes:
the matmuls of a layer's frozen linears and of attention, all of it that matters; and bytes that go
between host and device, at `WORK_OF_A_BYTE`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_kit.config.training import RECOMPUTE_LEVELS
from qlora_kit.data.batch import Batch
from qlora_kit.memory.counter import HOST, Interval, Sizes
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.step_time import Clock
from qlora_kit.plan.work import moved_bytes

WORK_OF_A_BYTE = 2000
"""Multiply-adds that are done while a byte goes to or from the host, where no card is known: the
median of `device/cards.py`, from 500 (RTX 3060) to 7,800 (H100). Copies hide behind work, so that
this is rather too much."""

PASSES = 2
"""Forward passes that a step without recomputing is worth: backward through frozen weights has no
gradient of them."""


@dataclass(frozen=True)
class Chosen:
    """Levels of the decoder layers, and the intervals of the passes with them."""

    levels: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once."""
        return max(interval.peak for interval in self.intervals)

    @property
    def host_peak(self) -> int:
        """The most bytes of a host beside the device at once."""
        return max(interval.largest.get(HOST, 0) for interval in self.intervals)


def choose_levels(
    run: FakeRun,
    micro_batches: Sequence[Batch],
    budget: int | None,
    clock: Clock | None = None,
    known: dict[tuple[str, ...], Chosen] | None = None,
    host_budget: int | None = None,
) -> Chosen:
    """The fastest levels whose passes stay within `budget` bytes of tensors.

    That is by time of `clock`, or by work where it is not known. Without a budget all layers keep
    everything; where `full` does not fit all are `full`. On very short rows with large adapters and
    no accumulation that is not the least: `selective` may take some megabytes less. What was traced
    for another budget is taken from `known`, and added to it.

    What a layer at `selective` keeps on the host is some times what `full` keeps there: it is taken
    within `host_budget` bytes of the host's memory, and not where nobody knows what it has free.
    """
    count = len(run.layers)
    made = {} if known is None else known

    def traced(levels: Sequence[str]) -> Chosen:
        return traced_at(run, micro_batches, levels, made)

    least = traced(["none"] * count)
    if budget is None or least.peak <= budget:
        return least
    most = traced(["full"] * count)
    if most.peak > budget:
        return most
    between = traced(["selective"] * count)
    traces = {"none": least, "selective": between, "full": most}
    too_much = _too_much(run, traces, budget, host_budget)
    may_select = host_budget is not None or not run.placement.activations_on_host
    cost = _costs(run, micro_batches, traces, clock)
    mixes = []
    for keeping in range(count):
        # The largest number of selective layers that fits beside `keeping` others.
        fitting = bisect.bisect_right(
            range(count - keeping + 1 if may_select else 1),
            False,
            key=lambda selective, keeping=keeping: too_much(selective, keeping),  # type: ignore[misc]
        )
        if fitting:
            selective = fitting - 1
            levels = _levels(count, selective, keeping)
            taken = sum(cost[level][layer] for layer, level in enumerate(levels))
            mixes.append((taken, keeping, selective))
    for _, keeping, selective in sorted(mixes):
        found = traced(_levels(count, selective, keeping))
        if found.peak <= budget and (host_budget is None or found.host_peak <= host_budget):
            return found
    return most


def traced_at(
    run: FakeRun,
    micro_batches: Sequence[Batch],
    levels: Sequence[str],
    known: dict[tuple[str, ...], Chosen],
) -> Chosen:
    """The passes with these levels, traced unless they are `known`, and added to what is."""
    key = tuple(levels)
    if key not in known:
        known[key] = Chosen(key, tuple(run.passes(micro_batches, levels)))
    return known[key]


def _too_much(
    run: FakeRun, traces: dict[str, Chosen], budget: int, host_budget: int | None
) -> Callable[[int, int], bool]:
    """Whether a mix of so many layers at `selective` and at `none` takes more than there is."""
    ledger = _Ledger(traces, run, run.total)
    on_host = _Ledger(traces, run, lambda sizes: sizes.get(HOST, 0))

    def too_much(selective: int, keeping: int) -> bool:
        if ledger.peak(selective, keeping) > budget:
            return True
        return host_budget is not None and on_host.peak(selective, keeping) > host_budget

    return too_much


def _costs(
    run: FakeRun, micro_batches: Sequence[Batch], traces: dict[str, Chosen], clock: Clock | None
) -> dict[str, Sequence[float]]:
    """What each layer costs at each level: seconds on a card, else the work that is done again."""
    if clock is not None:
        return {
            level: clock.layers(chosen.intervals, run.names) for level, chosen in traces.items()
        }
    batch = micro_batches[-1]["input_ids"]
    length, a_byte = int(batch.shape[1]), WORK_OF_A_BYTE / batch.numel()
    costs: dict[str, Sequence[float]] = {}
    for level in RECOMPUTE_LEVELS:
        moved = _moved(traces[level].intervals, run.names)
        costs[level] = [
            layer_work(layer, level, length, run.fused) + a_byte * moved[name]
            for layer, name in zip(run.layers, run.names, strict=True)
        ]
    return costs


def work_of(run: FakeRun, chosen: Chosen, tokens: int, length: int) -> float:
    """What a micro-batch costs, in multiply-adds: its passes, what is done again and moved."""
    redone = sum(
        layer_work(layer, level, length, run.fused)
        for layer, level in zip(run.layers, chosen.levels, strict=True)
    )
    moved = sum(moved_bytes(interval.work) for interval in chosen.intervals)
    return (PASSES * _forward_work(run, length) + redone) * tokens + moved * WORK_OF_A_BYTE


def _moved(intervals: Sequence[Interval], names: Sequence[str]) -> dict[str, int]:
    """Bytes that go between host and device in the passes of each layer, by its name."""
    found = dict.fromkeys(names, 0)
    for interval in intervals:
        if interval.module in found:
            found[interval.module] += moved_bytes(interval.work)
    return found


def layer_work(layer: nn.Module, level: str, length: int, fused: bool) -> int:
    """Multiply-adds a token that backward recomputes at a level, in rows of `length` tokens.

    Recomputation stops before the linear that ends the layer: backward does not need its output.
    `selective` does not recompute attention, and in a fused block `o_proj` neither. See
    `training/recompute.py`.
    """
    if level == "none":
        return _tiled_work(layer)
    left_out = _left_out(layer, "down_proj")
    if level == "selective" and fused:
        left_out += _left_out(layer, "o_proj")
    attention = 0 if level == "selective" else _attention_work(layer, length)
    return _linear_work(layer) - left_out + attention


def _tiled_work(layer: nn.Module) -> int:
    """What an MLP that goes over tiles computes again at any level; see `lora/tiles.py`."""
    block = getattr(layer.forward, "block", None)
    if block is None or not block.tiled:
        return 0
    again, last = block.mlp_linears
    if block.after[1] is not None:
        again = [*again, last]
    return sum(_size(getattr(linear, "base_layer", linear)) for linear in again)


def recomputed_share(run: FakeRun, levels: Sequence[str], length: int) -> float:
    """The work that backward recomputes, as a share of the forward pass through the decoder."""
    recomputed = sum(
        layer_work(layer, level, length, run.fused)
        for layer, level in zip(run.layers, levels, strict=True)
    )
    return recomputed / _forward_work(run, length)


def _forward_work(run: FakeRun, length: int) -> int:
    return sum(_linear_work(layer) + _attention_work(layer, length) for layer in run.layers)


class _Ledger:
    """The peak of any mix of levels, from the traces of all layers at each single level.

    A trace is a sequence of intervals, and the three traces have the same ones in the same order:
    forward through each layer, head and loss, backward through each layer. So the ledger has an
    entry for each interval: the layer that it is of (None for embedding, norm and head), and for
    each level two numbers, `over` and `added`: by how much the interval's peak is above the bytes
    at its beginning, and by how much its end is. Bytes are those that `total` finds. What a
    layer allocates depends on its own level alone, so the entry of its level holds beside layers of
    any other level.

    The peak of a mix is then a walk: begin with the bytes before the step, take each interval's
    entry at the level of its layer, look at `now + over`, go on with `now + added`.
    """

    def __init__(
        self, traces: dict[str, Chosen], run: FakeRun, total: Callable[[Sizes], int]
    ) -> None:
        own = total == run.total
        self._count = len(run.layers)
        layers = {name: number for number, name in enumerate(run.names)}
        self._begin = total(traces["none"].intervals[0].start)
        self._entries = [
            (
                layers.get(intervals[0].module),
                {
                    level: (
                        (interval.peak if own else total(interval.largest)) - total(interval.start),
                        total(interval.end) - total(interval.start),
                    )
                    for level, interval in zip(traces, intervals, strict=True)
                },
            )
            for intervals in zip(*(chosen.intervals for chosen in traces.values()), strict=True)
        ]

    def peak(self, selective: int, keeping: int) -> int:
        """The most bytes at once with so many layers at `selective` and at `none`."""
        levels = _levels(self._count, selective, keeping)
        now = peak = self._begin
        for layer, entry in self._entries:
            over, added = entry["none" if layer is None else levels[layer]]
            peak = max(peak, now + over)
            now += added
        return peak


def _levels(count: int, selective: int, keeping: int) -> list[str]:
    """All layers: those that recompute everything first, those that keep everything last."""
    full = count - selective - keeping
    return ["full"] * full + ["selective"] * selective + ["none"] * keeping


def _linear_work(layer: nn.Module) -> int:
    """Multiply-adds a token of a layer's linears, adapters left out: one for each weight."""
    linears = (module for module in layer.modules() if isinstance(module, nn.Linear))
    return sum(_size(linear) for linear in linears if not linear.weight.requires_grad)


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _left_out(layer: nn.Module, name: str) -> int:
    """The work of a linear that ends what is recomputed; 0 where a norm reads its output."""
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

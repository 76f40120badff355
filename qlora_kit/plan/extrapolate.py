"""The step of a deep model from a step through few of its layers.

Neighbouring layers of one kind at one level allocate and free the same bytes in the same order;
only what is there when they begin differs. So of a run of equal layers three are traced: the first
and the last, whose other neighbours may be of another kind, and one between, which stands for all
that lie between. Its interval is repeated for each of them, moved to begin with what the interval
before left: `start`, `end`, `at_peak` and `largest` change by the same bytes of each component. In
backward the intervals of those layers come in the opposite order.

This is exact and no estimate: fake tensors have neither values nor an allocator, so what an
interval changes depends on the layer's shapes alone. A test compares every component of every
interval with a trace through all layers; nothing else about a layer is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence

from qlora_kit.memory.counter import Interval, Sizes

TRACED = 3
"""Layers of a run: the first, one between, the last."""


def cut(kinds: Sequence[Hashable]) -> list[int]:
    """Which layers stand for all: of each run of equal kinds at most the first two and the last."""
    chosen = []
    for _, members in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        run = list(members)
        chosen += run if len(run) <= TRACED else [run[0], run[1], run[-1]]
    return chosen


def extend(
    traced: Sequence[Interval],
    chosen: Sequence[int],
    names: Sequence[str],
    apart: Collection[str],
) -> list[Interval]:
    """The intervals of all layers, from those through `chosen` ones.

    `names` are the modules' names of all layers; the traced ones are named after their places in
    `chosen`. Components that lie `apart` are in no sum.
    """
    ends = [*chosen[1:], len(names)]
    covered = {
        names[place]: range(first, end)
        for place, (first, end) in enumerate(zip(chosen, ends, strict=True))
    }
    result: list[Interval] = []
    now = dict(traced[0].start) if traced else {}
    for interval in traced:
        layers = covered.get(interval.module)
        modules = [interval.module] if layers is None else [names[i] for i in layers]
        if interval.phase == "backward":
            modules.reverse()
        for module in modules:
            made = moved(interval, module, now, apart)
            result.append(made)
            now = dict(made.end)
    return result


def moved(interval: Interval, module: str, start: Sizes, apart: Collection[str]) -> Interval:
    """The same interval of another `module`, beginning with `start`."""
    shift = {
        name: start.get(name, 0) - interval.start.get(name, 0)
        for name in {**interval.start, **start}
    }

    def shifted(sizes: Mapping[str, int]) -> Sizes:
        return {name: sizes.get(name, 0) + shift.get(name, 0) for name in {**sizes, **shift}}

    at_peak = shifted(interval.at_peak)
    return Interval(
        interval.phase,
        module,
        dict(start),
        shifted(interval.end),
        at_peak,
        shifted(interval.largest),
        peak=sum(size for name, size in at_peak.items() if name not in apart),
    )

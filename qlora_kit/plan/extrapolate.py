"""The step of a deep model from a step through few of its layers.

Neighbouring layers of one kind at one level allocate and free the same bytes in the same order;
only what is there when they begin differs. So of a run of equal layers three are traced: the first
and the last, whose other neighbours may be of another kind, and one between, which stands for all
that lie between. Its interval is repeated for each of them, moved to begin with what the interval
before left: `start`, `end`, `at_peak` and `largest` change by the same bytes of each component. In
backward the intervals of those layers come in the opposite order.

Layers that differ in kind often follow a pattern (three of a recurrence, one of attention, again
and again). A pattern is then what a single layer is above: its first and its last repetition are
traced, and one between, whose intervals are repeated together.

This is exact and no estimate: fake tensors have neither values nor an allocator, so what an
interval changes depends on the layer's shapes alone. A test compares every component of every
interval with a trace through all layers; nothing else about a layer is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from qlora_kit.memory.counter import Interval, Sizes

TRACED = 3
"""Repetitions of a pattern: the first, one between, the last."""


class Part(NamedTuple):
    """Layers from `first` on, as many as a pattern has, that stand for so many repetitions of it.

    A pattern of one layer is a run of equal ones.
    """

    first: int
    length: int
    repetitions: int = 1

    @property
    def layers(self) -> range:
        """Those that are traced."""
        return range(self.first, self.first + self.length)


def cut(kinds: Sequence[Hashable]) -> list[Part]:
    """Which layers stand for all: of each repeated pattern the first two repetitions and the last.

    At each layer the shortest pattern that repeats more than three times is taken.
    """
    parts: list[Part] = []
    first = 0
    while first < len(kinds):
        length, count = _pattern(kinds, first)
        middle, last = first + length, first + (count - 1) * length
        parts.append(Part(first, length))
        if count > 1:
            parts += [Part(middle, length, count - 2), Part(last, length)]
        first += count * length
    return parts


def layers_of(parts: Sequence[Part]) -> list[int]:
    """The layers that are traced, in their order."""
    return [layer for part in parts for layer in part.layers]


def _pattern(kinds: Sequence[Hashable], first: int) -> tuple[int, int]:
    """The length of the pattern that begins at a layer, and how often it is there; 1 and 1 too."""
    for length in range(1, (len(kinds) - first) // (TRACED + 1) + 1):
        same = itertools.takewhile(
            lambda layer, length=length: kinds[layer] == kinds[layer + length],  # type: ignore[misc]
            range(first, len(kinds) - length),
        )
        if (count := sum(1 for _ in same) // length + 1) > TRACED:
            return length, count
    return 1, 1


def extend(
    traced: Sequence[Interval],
    parts: Sequence[Part],
    names: Sequence[str],
    apart: Collection[str],
) -> list[Interval]:
    """The intervals of all layers, from those through the layers of `parts`.

    `names` are the modules' names of all layers; the traced ones are named after their places in
    the shorter model. Components that lie `apart` are in no sum.
    """
    places = ((number, layer) for number, part in enumerate(parts) for layer in part.layers)
    owners = dict(zip(names, places, strict=False))  # name to the number of its part, and its layer
    result: list[Interval] = []
    now = dict(traced[0].start) if traced else {}

    def owner(interval: Interval) -> tuple[str, int | None]:
        return interval.phase, owners.get(interval.module, (None, 0))[0]

    for (phase, number), group in itertools.groupby(traced, owner):
        intervals = list(group)
        repetitions = range(1 if number is None else parts[number].repetitions)
        for repetition in reversed(repetitions) if phase == "backward" else repetitions:
            for interval in intervals:
                module = interval.module
                if number is not None:
                    module = names[owners[module][1] + repetition * parts[number].length]
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
        work=interval.work,
    )

"""How long a step takes on a card: an estimate, from the operations of the step on fake tensors.

Each operation takes the longest of three times: its FLOP at the rate that matmuls or attention
reach, its bytes at the bandwidth that is reached, and what the shortest kernel takes. Their sum is
the time of the device. The host launches kernel after kernel meanwhile; where it is the slower one
of a layer's pass, the device waits for it (`gaps`), though kernels of the layers before may still
hide that. Copies between host and device have a link and a stream of their own: what they take
longer than the layer that they run beside is a wait (`transfer`). Nothing overlaps else.

There is no formula of a step here: `plan/work.py` reads the work off the operations, of a few
layers, and `plan/extrapolate.py` repeats it. Not in it: loading of batches, evaluation, saving,
lower clocks of a hot card. It was compared with no card yet, so that its error is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.device.cards import Card
from qlora_kit.device.target import Capability
from qlora_kit.memory.counter import Interval
from qlora_kit.memory.profiler import HEAD
from qlora_kit.plan.work import KINDS, TRANSFER, Work, moved_bytes

GAPS = "gaps"
ATTENTION_REACHED = 0.6
"""Of the matmuls' rate: Dao, FlashAttention-2 (arXiv 2307.08691), 50 to 73 % of an A100's peak."""
SHORTEST_S = 2e-6
"""A kernel that does next to nothing takes this long on the device; a common figure."""


@dataclass(frozen=True)
class StepTime:
    """Modelled seconds of an optimizer step on `card`, by kind; `gaps` are waits for the host.

    The step has so many `tokens`, padding included, and `kernels` that are launched, `flops` and
    `bytes` that are read and written; `moved_bytes` go between host and device.
    """

    card: str
    seconds: dict[str, float]
    tokens: int
    kernels: int
    flops: int
    bytes: int
    moved_bytes: int = 0

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens that a second trains on, padding included."""
        return self.tokens / self.total_s

    def as_json(self) -> dict[str, Any]:
        """What `qlora-kit plan --json` prints of it."""
        return {
            "card": self.card,
            "seconds": dict(self.seconds),
            "step_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
            "kernels": self.kernels,
            "flops": self.flops,
            "bytes": self.bytes,
            "moved_bytes": self.moved_bytes,
            "is_estimate": True,
        }


@dataclass(frozen=True)
class Clock:
    """Times on a card."""

    card: Card

    @property
    def capability(self) -> Capability:
        """The card's compute capability."""
        return self.card.capability

    def step(
        self,
        passes: Iterable[Interval],
        update: Iterable[Interval],
        micro_steps: int,
        tokens: int,
    ) -> StepTime:
        """A step of `micro_steps` passes and one update, which has so many `tokens` in all."""
        seconds = dict.fromkeys((*KINDS, GAPS), 0.0)
        kernels = flops = size = moved = 0
        for intervals, count in ((passes, micro_steps), (update, 1)):
            for interval in intervals:
                for kind, taken in interval_seconds(interval, self.card).items():
                    seconds[kind] += taken * count
                moved += count * moved_bytes(interval.work)
                for work, times in interval.work.items():
                    kernels += count * times * work.kernels
                    flops += count * times * work.flops
                    size += count * times * work.bytes
        return StepTime(self.card.name, seconds, tokens, kernels, flops, size - moved, moved)

    def layers(self, intervals: Sequence[Interval], names: Sequence[str]) -> list[float]:
        """Seconds of forward and backward of each of the layers, by their modules' names."""
        found = dict.fromkeys(names, 0.0)
        for interval in intervals:
            if interval.module in found:
                found[interval.module] += sum(interval_seconds(interval, self.card).values())
        return list(found.values())


def interval_seconds(interval: Interval, card: Card) -> dict[str, float]:
    """Seconds of an interval by kind, waits for the host and for copies among them."""
    found: Counter[str] = Counter()
    launches = 0
    for work, times in interval.work.items():
        found[_shown_kind(work, interval)] += times * seconds_of(work, card)  # type: ignore[assignment]
        launches += times * work.kernels
    copies = found.pop(TRANSFER, 0.0)
    found[GAPS] = max(0.0, launches * card.launch_s - sum(found.values()))  # type: ignore[assignment]
    found[TRANSFER] = max(0.0, copies - sum(found.values()))  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


def seconds_of(work: Work, card: Card) -> float:
    """Seconds of an operation on the device, or of a copy between it and the host."""
    if work.kind == TRANSFER:
        return work.bytes / card.link_rate
    rate = card.flops_fp32 if work.wide else card.matmul_rate
    if work.kind == "attention":
        rate *= ATTENTION_REACHED
    times = work.flops / rate, work.bytes / card.memory_rate, work.kernels * SHORTEST_S
    return max(times)


def _shown_kind(work: Work, interval: Interval) -> str:
    """The kind of an operation by where it is: what is no product of the loss or the update."""
    if work.kind != "elementwise":
        return work.kind
    if interval.phase == "step":
        return "optimizer"
    return "loss" if interval.module == HEAD else work.kind

"""The longest rows that fit, to within `STEP` tokens, by plans of a few lengths.

A step's peak is affine in the length of its rows, or a few such pieces one after another. So a line
through the two plans that are nearest to the budget says where it is met: few plans bracket it. The
first line is that through the longest rows and what a step holds whatever their length. The answer
is no estimate: it is planned, and so is the length `STEP` tokens above, which does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.config.training import RECOMPUTE_LEVELS, Placement
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.sum_up import HELD

STEP = 64
LINES = 8
"""Guesses by a line; after so many the interval is halved."""


@dataclass(frozen=True)
class Longest:
    """The longest rows at a level, and their plan; `is_most` where more were not asked for.

    Where not even `STEP` tokens fit, `tokens` are 0, and the plan is that of so many.
    """

    level: str
    tokens: int
    plan: MemoryPlan
    is_most: bool = False

    def as_json(self) -> dict[str, Any]:
        """What `qlora-kit plan --longest --json` prints of it."""
        return {
            "gradient_checkpointing": self.level,
            "placement": asdict(self.plan.in_effect),
            "tokens": self.tokens,
            "peak_bytes": self.plan.peak_bytes,
            "host_peak_bytes": self.plan.host_peak_bytes,
            "is_context": self.is_most,
        }


def longest_at_all_levels(
    planner: Planner, shape: BatchShape, budget_bytes: int, micro_steps: int
) -> Iterator[Longest]:
    """The longest rows up to the model's context, at each level and with `auto`.

    First with what is asked for alone, then with all that is left to auto but the base on the host,
    which costs most, then with that too.
    """
    places = planner.placements
    without_base = [one for one in places if one.base_on_host == places[0].base_on_host]
    for placement in dict.fromkeys((places[0], without_base[-1], places[-1])):
        for level in (*RECOMPUTE_LEVELS, "auto"):
            if placement.activations_on_host and level == "none":
                continue  # what is moved are inputs of layers that recompute
            most, steps = planner.run.context, micro_steps
            yield longest_rows(planner, shape, level, budget_bytes, placement, steps, most)


def longest_rows(
    planner: Planner,
    shape: BatchShape,
    level: str,
    budget_bytes: int,
    placement: Placement,
    micro_steps: int,
    most: int,
) -> Longest:
    """The longest rows of such micro-batches, of at most `most` tokens, with the level given.

    The optimizer is the last of those that the options allow, which takes least.
    """
    # Where a mix of levels would fit all layers recompute, too; less than that does not help.
    one_level = "full" if level == "auto" else level

    def planned(length: int, level: str = one_level) -> MemoryPlan:
        asked = BatchShape(shape.rows, length, length, shape.packed)
        optim = planner.optims[-1]
        return planner.plan(asked, level, budget_bytes, micro_steps, optim, placement)

    tokens, plan = _search(planned, budget_bytes, most)
    if tokens and level != one_level:
        plan = planned(tokens, level)
    return Longest(level, tokens, plan, is_most=tokens == most)


def _search(
    planned: Callable[[int], MemoryPlan], budget_bytes: int, most: int
) -> tuple[int, MemoryPlan]:
    """The largest length that fits and its plan: `most`, or a multiple of `STEP`; else 0."""
    top = planned(most)
    if top.fits or most <= STEP:
        return most if top.fits else 0, top
    found = {most: top}
    low, high, lines = 0, most, 0
    while high - low > STEP:
        guess = _crossing(found, budget_bytes) if lines < LINES else (low + high) // 2
        lines += 1
        guess = min(max(guess // STEP * STEP, low + STEP), (high - 1) // STEP * STEP)
        found[guess] = planned(guess)
        low, high = (guess, high) if found[guess].fits else (low, guess)
    return low, found[low or high]


def _crossing(found: dict[int, MemoryPlan], budget_bytes: int) -> int:
    """Where the line through the two plans nearest to the budget meets it."""
    over = {length: _over(plan, budget_bytes) for length, plan in found.items()}
    if len(over) == 1:
        (plan,) = found.values()
        over[0] = _over(plan, budget_bytes) - plan.peak_bytes + _whatever_length(plan)
    first, second = sorted(over, key=lambda length: abs(over[length]))[:2]
    rise = over[second] - over[first]
    if not rise:
        return first
    return first - over[first] * (second - first) // rise


def _over(plan: MemoryPlan, budget_bytes: int) -> int:
    """By how much a plan is above what there is, on the device or on the host."""
    over_device = plan.peak_bytes + plan.margin_bytes - budget_bytes
    if plan.host_budget_bytes is None:
        return over_device
    return max(over_device, plan.host["step"] - plan.host_budget_bytes)


def _whatever_length(plan: MemoryPlan) -> int:
    """Bytes of a step on the device that are there with rows of any length."""
    held = (*(name for name in HELD if name != "paged"), "gradients")
    return sum(plan.bytes[name] for name in held) + plan.at_peak.get("overhead", 0)

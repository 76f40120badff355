"""The longest rows that fit, to within `STEP` tokens, by plans of a few lengths.

A step's peak is affine in the length of its rows, or a few such pieces one after another. So a line
through the two plans that are nearest to the budget says where it is met: few plans bracket it. The
answer is no estimate: it is planned, and so is the length `STEP` tokens above, which does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.config.training import RECOMPUTE_LEVELS, Placement
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner

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
            "placement": asdict(self.plan.placement),
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
    if top.fits:
        return most, top
    least = planned(min(STEP, most))
    if not least.fits or most <= STEP:
        return 0, least
    found = {STEP: least, most: top}
    low, high, lines = STEP, most, 0
    while high - low > STEP:
        guess = _crossing(found, budget_bytes) if lines < LINES else (low + high) // 2
        lines += 1
        guess = min(max(guess // STEP * STEP, low + STEP), (high - 1) // STEP * STEP)
        found[guess] = planned(guess)
        low, high = (guess, high) if found[guess].fits else (low, guess)
    return low, found[low]


def _crossing(found: dict[int, MemoryPlan], budget_bytes: int) -> int:
    """Where the line through the two plans nearest to the budget meets it."""

    def over(length: int) -> int:
        plan = found[length]
        over_device = plan.peak_bytes + plan.margin_bytes - budget_bytes
        if plan.host_budget_bytes is None:
            return over_device
        return max(over_device, plan.host["step"] - plan.host_budget_bytes)

    first, second = sorted(found, key=lambda length: abs(over(length)))[:2]
    rise = over(second) - over(first)
    if not rise:
        return first
    return first - over(first) * (second - first) // rise

"""Which placement and which optimizer a run takes, of those that its options allow.

The first placement has everything on the device, as far as nothing else is asked for: a run that
fits with it tries no other one. Else the others are planned in their order, each of which holds
less on the device than the one before and moves more, up to the first that fits. What it frees may
be worth a placement more: less has to be recomputed. So the next ones are planned too, as long as
each makes the step faster than the one before. Within a placement the optimizer is the first that
fits, and the levels of recompute are chosen in `levels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qlora_kit.config.training import Placement
from qlora_kit.plan.memory_plan import MemoryPlan


def choose(
    placements: Sequence[Placement],
    optims: Sequence[str],
    plans_of: Callable[[Placement, str], list[MemoryPlan]],
    cost_of: Callable[[MemoryPlan], float],
    may_gain: bool,
) -> list[MemoryPlan]:
    """The plans of a run's micro-batches with the placement and the optimizer that it takes.

    Those that cost the least of those that fit, else those of the last placement and optimizer.
    `cost_of` compares plans of one micro-batch. Unless levels of recompute may change (`may_gain`)
    the first placement that fits is the one.
    """
    first: list[MemoryPlan] | None = None
    best: list[MemoryPlan] | None = None
    plans: list[MemoryPlan] = []
    for placement in placements:
        for optim in optims:
            plans = plans_of(placement, optim)
            if all(plan.fits for plan in plans):
                break
        first = first or plans
        if not all(plan.fits for plan in plans):
            if best is not None:
                break
            continue
        if best is not None and sum(map(cost_of, plans)) >= sum(map(cost_of, best)):
            break
        best = plans
        if plans is first or not may_gain or not any(plan.recomputed for plan in plans):
            break
    taken = best or plans
    assert first is not None  # there is a placement
    if taken is first:
        return taken
    without = max(plan.peak_bytes for plan in first)
    return [replace(plan, peak_bytes_without=without) for plan in taken]

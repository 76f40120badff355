"""Which placement and which optimizer a run takes, of those that its options allow.

The first placement has everything on the device, as far as nothing else is asked for: a run that
fits with it tries no other one. Else the others are planned in their order, each of which holds
less on the device than the one before and moves more, up to the first that fits. What it frees may
be worth a placement more: less has to be recomputed. So the next ones are planned too, as long as
each makes the step faster; one that takes more of the host, which holds other things as well and is
not always known, is taken for `HOST_GAIN` of a step's time at least. Within a placement the
optimizer is the first that fits, and the levels of recompute are chosen in `levels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qlora_kit.config.training import Placement
from qlora_kit.plan.memory_plan import MemoryPlan

HOST_GAIN = 0.05
"""Of a step's planned time, for each placement more that takes more of the host's memory."""
FEW_BYTES = 2**26
"""More than that is more of the host's memory: batches that wait are not."""


def choose(
    placements: Sequence[Placement],
    optims: Sequence[str],
    plans_of: Callable[[Placement, str], list[MemoryPlan]],
    cost_of: Callable[[MemoryPlan], float],
    may_gain: bool,
) -> list[MemoryPlan]:
    """The plans of a run's micro-batches with the placement and the optimizer that it takes.

    Those that cost the least of those that fit, else those of the last placement and optimizer for
    which the host has room. `cost_of` compares plans of one micro-batch. Unless levels of recompute
    may change (`may_gain`) the first placement that fits is the one.
    """
    first: list[MemoryPlan] | None = None
    fitting: list[MemoryPlan] | None = None
    best: list[MemoryPlan] | None = None
    last: list[MemoryPlan] | None = None
    wanted: int | None = None
    steps = 0
    for placement in placements:
        for optim in optims:
            plans = plans_of(placement, optim)
            if all(plan.fits for plan in plans):
                break
        first = first or plans
        if not any(plan.missing_on_host_bytes for plan in plans):
            last = plans
        elif wanted is None and not any(plan.missing_bytes for plan in plans):
            wanted = on_host(plans)
        if not all(plan.fits for plan in plans):
            if best is not None:
                break
            continue
        if best is not None:
            steps += 1
            cost, least = sum(map(cost_of, plans)), sum(map(cost_of, best))
            if cost >= least:
                break
            if takes_more_of_host(plans, best) and cost > (1 - HOST_GAIN) ** steps * least:
                continue
        fitting, best, steps = fitting or plans, plans, 0
        if plans is first or not may_gain or not any(plan.recomputed for plan in plans):
            break
    assert first is not None  # there is a placement
    if best is None:
        best = [replace(plan, host_wanted_bytes=wanted) for plan in last or first]
    elif fitting is not None and best is not fitting:
        gain = 1 - sum(map(cost_of, best)) / sum(map(cost_of, fitting))
        slower = fitting[0].in_effect
        best = [replace(plan, slower=slower, gain=gain) for plan in best]
    if best[0].placement == first[0].placement:
        return best
    without = max(plan.peak_bytes for plan in first)
    return [replace(plan, peak_bytes_without=without) for plan in best]


def on_host(plans: Sequence[MemoryPlan]) -> int:
    """The most that a step takes of a host beside its device."""
    return max(plan.beside_bytes for plan in plans)


def takes_more_of_host(plans: Sequence[MemoryPlan], others: Sequence[MemoryPlan]) -> bool:
    """Whether a step takes more of the host's memory with the one than with the others."""
    return on_host(plans) > on_host(others) + FEW_BYTES

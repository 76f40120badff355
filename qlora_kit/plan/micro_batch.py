"""How many rows a micro-batch should have: those that make the same step in the least time.

A weight in 4 bits is dequantized once for each micro-batch and pass, however few its tokens are, so
that more rows at a time are faster until they have to be recomputed, or are padded to the longest
one. The rows of a step stay what they are, and its loss is that of all its supervised tokens: in
whatever micro-batches, it is the same step up to rounding and to the masks of dropout.
"""

from __future__ import annotations

from collections.abc import Callable

from qlora_kit.plan.choose import HOST_GAIN, takes_more_of_host
from qlora_kit.plan.memory_plan import MemoryPlan

LEAST_GAIN = 0.02
"""Of a step's time, for which more rows at a time are taken."""


def fastest_rows(
    step_rows: int,
    plan_of: Callable[[int], MemoryPlan],
    seconds_of: Callable[[int, MemoryPlan], float],
) -> int:
    """The rows of a micro-batch, a divisor of `step_rows`; 1 where nothing more fits.

    `plan_of` says whether a micro-batch of so many rows fits, `seconds_of` what a step then takes.
    It is asked for more and more rows, until they do not fit or gain little; for what takes more of
    the host's memory they have to gain more.
    """
    first = plan_of(1)
    best, before, least = 1, first, seconds_of(1, first)
    for rows in (rows for rows in range(2, step_rows + 1) if step_rows % rows == 0):
        plan = plan_of(rows)
        if not plan.fits:
            break
        seconds = seconds_of(rows, plan)
        gain = HOST_GAIN if takes_more_of_host([plan], [before]) else LEAST_GAIN
        if seconds > (1 - gain) * least:
            break
        best, before, least = rows, plan, seconds
    return best

"""What a run takes, summed up from the intervals of its loading, its passes and its update."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.device.found import Overhead
from qlora_kit.memory.counter import COMPONENTS, HOST, Interval, Sizes, most_of_each
from qlora_kit.plan.fake_model import IDLE
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.levels import Chosen, recomputed_share, work_of
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.work import moved_bytes

HELD = ("weights_quantized", "weights_other", "adapters", "optimizer", "paged")
"""Those that are there before a step and after it."""


def sum_up(
    run: FakeRun,
    chosen: Chosen,
    shape: BatchShape,
    tokens: int,
    overhead: Overhead,
    budget_bytes: int | None,
) -> MemoryPlan:
    """The plan of a run on its device, for micro-batches of so many `tokens`; without its time."""
    updates = run.updates_after(chosen.intervals[-1].end)
    everything = (*run.loading, *chosen.intervals, *updates)
    highest = max(everything, key=lambda interval: interval.peak)
    at_peak = {k: n for k, n in highest.at_peak.items() if n and k not in (HOST, IDLE)}
    # What is held is what the passes find; the optimizer's step has more for a moment.
    sizes = most_of_each(chosen.intervals) | {
        name: size for name, size in chosen.intervals[0].start.items() if name in HELD
    }
    bytes_ = {name: sizes.get(name, 0) for name in COMPONENTS}
    bytes_["weights"] = bytes_["weights_quantized"] + bytes_["weights_other"]
    phases: Sizes = {}
    for interval in everything:
        phases[interval.phase] = max(phases.get(interval.phase, 0), interval.peak)
    fixed = overhead.fixed
    return MemoryPlan(
        bytes=bytes_,
        peak_bytes=highest.peak + fixed,
        peak_phase=highest.phase,
        peak_module=highest.module,
        at_peak={**at_peak, "overhead": fixed} if fixed else at_peak,
        phases=phases,
        host={
            "load": _host_bytes(run, run.loading),
            "step": _host_bytes(run, (*chosen.intervals, *updates)),
        },
        device=run.device.type,
        levels=chosen.levels,
        recomputed=recomputed_share(run, chosen.levels, shape.length),
        budget_bytes=budget_bytes,
        margin_bytes=overhead.margin(highest.peak),
        tokens=tokens,
        moved_bytes=sum(moved_bytes(one.work) for one in chosen.intervals),
        work=work_of(run, chosen, tokens, shape.length),
    )


def _host_bytes(run: FakeRun, intervals: Sequence[Interval]) -> int:
    """The most that lies in the host's memory, which is all of it where the device has none."""
    if HOST in run.apart:
        return most_of_each(intervals).get(HOST, 0)
    return max(interval.peak for interval in intervals)

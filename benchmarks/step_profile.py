"""Where the time of a step goes: by operation, and on CUDA by kernel.

The profiler lists an operator and the kernels that it launched as events of their own, both with
the kernels' time on the device; so only those events are summed that happened on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

PROFILED = 20


def profiled(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Seconds of one call by operation (`by_name`), the largest first and the others together.

    On CUDA by kernel, with the number of `launches`, their sum `kernels_s` and `wall_s`, which is
    longer than that of a call that is not profiled.
    """
    cuda = device.startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        with profile(activities=kinds):  # the first of a process makes its buffers
            torch.zeros(1, device=device).sum().item()
    with profile(activities=kinds) as found:
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    events = list(found.key_averages())
    if not cuda:
        return {"by_name": largest({one.key: one.self_cpu_time_total / 1e6 for one in events})}
    kernels = [one for one in events if on_device(one)]
    spent = {one.key: one.self_device_time_total / 1e6 for one in kernels}
    return {
        "by_name": largest(spent),
        "launches": sum(one.count for one in kernels),
        "kernels_s": sum(spent.values()),
        "wall_s": wall,
    }


def on_device(event: FunctionEventAvg) -> bool:
    """Whether an event is a kernel, a copy or a fill, and not the operator that launched it."""
    kind = getattr(event, "device_type", None)
    return kind == torch.autograd.DeviceType.CUDA and not getattr(
        event, "is_user_annotation", False
    )


def largest(spent: dict[str, float]) -> dict[str, float]:
    """The largest `PROFILED` of some seconds, and all others in one."""
    names = sorted(spent, key=spent.__getitem__, reverse=True)
    rest = sum(spent[name] for name in names[PROFILED:])
    return {name: spent[name] for name in names[:PROFILED]} | {"all others": rest}

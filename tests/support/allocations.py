"""The peak of what torch allocates, by the allocation events of its own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def profiled_peak(call: Callable[[], Any]) -> int:
    """The most bytes that `call` has at once beyond those from before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak

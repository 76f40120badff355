"""Seconds of the processor: laws of time are in them, for other work on a machine is not."""

from __future__ import annotations

import os


def processor_s() -> float:
    """Of all threads of this process, and of its children that have ended."""
    return sum(os.times()[:4])

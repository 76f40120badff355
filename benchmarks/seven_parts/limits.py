"""What is asked of the steps of `seven_billion.py`, worked out from their rows: found, and held.

A limit that needs a step which was not measured is left out; one of a step that failed is not held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30
LOADING = int(1.2 * GIB)
"""What a process that loads may take beside the weights."""
SHARE = 0.05
"""How far a step may be from the plan and the imports."""
TIMES_AS_FAST = 10.0
"""The second start, beside the first."""
BY_HASHING = 1.5
"""The second start, beside reading and hashing the same files once."""
OF_BF16 = {"load, one file": 0.29, "load, small head": 0.265}
"""Weights in 4 bits beside those of the checkpoint."""
Steps = Mapping[str, Mapping[str, Any]]


def limits(steps: Steps, bits: int) -> list[dict[str, Any]]:
    """The limits of one width: step, what, unit, what was found and asked, whether it is held."""
    return [
        {"step": step, "what": what, "unit": unit, "found": found, "asked": asked, "held": held}
        for step, what, unit, found, asked, held in _limits(steps, bits)
    ]


def _limits(steps: Steps, bits: int) -> Iterator[tuple[str, str, str, float, float, bool]]:
    whole = {name: row for name, row in steps.items() if "failed" not in row}
    for name in steps:
        if name not in whole:
            yield name, "ends well", "", False, True, False
    for name, row in whole.items():
        if "beside_weights" in row:
            found = row["beside_weights"]
            yield name, "peak beside the weights", "GiB", found, LOADING, found <= LOADING
        if bits == 4 and name in OF_BF16:
            share, most = row["weights"] / row["checkpoint"], OF_BF16[name]
            yield name, "weights beside those in bf16", "share", share, most, share <= most
    if "kill and resume" in whole:
        row = whole["kill and resume"]
        same = row["killed"] and row["equal_losses"] and row["equal_adapters"]
        yield "kill and resume", "the same losses and adapter", "", same, True, same
    yield from _of_starts(whole)
    yield from _beside_imports(whole)


def _of_starts(steps: Steps) -> Iterator[tuple[str, str, str, float, float, bool]]:
    """The second start beside the first, and beside reading and hashing."""
    if "second start" not in steps:
        return
    second = steps["second start"]
    ratio = second["load_s"] / second["hash_s"]
    what = "time beside reading and hashing"
    yield "second start", what, "times", ratio, BY_HASHING, ratio <= BY_HASHING
    if first := steps.get("first start"):
        ratio = first["load_s"] / second["load_s"]
        what = "times as fast as the first"
        yield "second start", what, "times", ratio, TIMES_AS_FAST, ratio >= TIMES_AS_FAST
        same = first["tensors"] == second["tensors"]
        yield "second start", "the same tensors as the first", "", same, True, same


def _beside_imports(steps: Steps) -> Iterator[tuple[str, str, str, float, float, bool]]:
    """A step beside its plan, an export beside what is loaded."""
    if "imports" not in steps:
        return
    imports = steps["imports"]
    if row := steps.get("finetune"):
        off = row["peak_rss"] / (row["planned"] + imports["finetune"]) - 1
        yield "finetune", "peak beside plan and imports", "off", off, SHARE, abs(off) <= SHARE
    loaded = [one["weights"] for name, one in steps.items() if name in LOADS]
    if (row := steps.get("export")) and loaded:
        above, most = row["peak_rss"] - loaded[0] - imports["export"], row["largest"] + GIB
        yield "export", "peak beside what is loaded", "GiB", above, most, above <= most


LOADS = ("load, one file", "load, shards", "first start", "second start")
"""Steps that hold what an export loads."""

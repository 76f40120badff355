"""Every family with every combination of options on a fake accelerator: what breaks which law.

    python benchmarks/accelerator.py --families llama3,gemma3

Each combination of bits, recompute, packing and dropout trains one step on a device of fake tensors
(`tests/support/accelerator.py`): it mixes no devices, copies its batch alone and reads nothing. The
tests try a part of the combinations; this is all of them. Nothing is timed and nothing is computed.
Writes results/accelerator.json after every family.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("support", "accelerator")]

from families import TRAITS  # noqa: E402
from test_every_family import (  # noqa: E402
    FOUND_OUT,
    KEEP_NO_ROWS_APART,
    Case,
    test_a_family_mixes_no_devices_and_waits_for_none,
)

LEVELS = ("none", "selective", "full")


def main() -> None:
    parser = record.make_parser(__doc__, "accelerator")
    every = (*TRAITS, *FOUND_OUT)
    parser.add_argument("--families", default=",".join(every), help="which, by commas (all)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--card", default="8.6", help="compute capability (%(default)s)")
    given = parser.parse_args()
    card = tuple(map(int, given.card.split(".")))
    found: dict[str, Any] = {}
    for family in given.families.split(","):
        broken, tried = {}, 0
        packing = (False,) if family in KEEP_NO_ROWS_APART else (False, True)
        for bits, level, packed, dropout in itertools.product(
            (4, 8, 16), LEVELS, packing, (0.0, 0.1)
        ):
            half = family in TRAITS and bits < 16
            options = (bits, half, level, packed, dropout, given.dtype, card, True, "all-linear")
            case = Case(family, *options)
            tried += 1
            if problem := problem_of(case):
                broken[case.name] = problem
        found[family] = {"combinations": tried, "broken": broken}
        print(f"{family}: {tried} combinations, {len(broken)} break a law", flush=True)
        record.write_result(given, {"dtype": given.dtype, "card": given.card, "families": found})


def problem_of(case: Case) -> str | None:
    """What a case breaks, in words; None for nothing."""
    try:
        test_a_family_mixes_no_devices_and_waits_for_none(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


if __name__ == "__main__":
    main()

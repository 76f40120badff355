"""The table of the README that says what a card showed, from the result of `gpu.py`.

    python benchmarks/gpu_table.py                  # benchmarks/results/gpu.json into README.md

Without a result the README says that CUDA was not run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "gpu.json"
PAGE = HERE.parent / "README.md"
MARKS = re.compile(r"(<!-- cuda -->\n).*?(<!-- /cuda -->)", re.S)
NOT_RUN = (
    "It is written for CUDA. **So far everything was measured on CPUs: the CUDA path has not been "
    "run.**\n"
)
SIDES = {"peft_guide, full": "PEFT as its guide says", "peft_best": "PEFT at its best"}


def rendered(result: dict[str, Any] | None) -> str:
    """What stands between the marks. Errors: `ValueError` for a result of a CPU or small models."""
    if result is None:
        return NOT_RUN
    if result["device"] != "cuda" or result["small"]:
        raise ValueError("this result is not that of a card with the real shapes")
    return "\n".join([_words(result), "", *_memory_rows(result), "", *_speed_rows(result), ""])


def _words(result: dict[str, Any]) -> str:
    parts = result["parts"]
    card = (
        parts.get("start", {}).get("card", {}).get("name") or result["measured"]["machine"]["gpu"]
    )
    errors = [abs(one["error"]) for one in _points(result).values() if "error" in one]
    off = f" Plans are off by {max(errors):.1%} at most." if errors else ""
    decoded = [
        f"{parts['decode'][name]['tokens_per_s']:,.0f} with {name}"
        for name in ("1 rows", "8 rows")
        if name in parts.get("decode", {})
    ]
    decoding = f" Decoded tokens a second: {', '.join(decoded)}." if decoded else ""
    return (
        f"It is written for CUDA, and was measured on one {card} (`benchmarks/gpu.py`): random "
        f"weights of the real shapes, 4 bits, r 16 on all linears, AdamW.{off}{decoding}"
    ).replace("1 rows", "1 row")


def _points(result: dict[str, Any]) -> dict[str, Any]:
    parts = result["parts"]
    names = ("memory", "memory_7b")
    return {k: v for name in names for k, v in parts.get(name, {}).get("points", {}).items()}


def _memory_rows(result: dict[str, Any]) -> list[str]:
    lines = ["| step | planned | allocated | reserved |", "|---|---:|---:|---:|"]
    for name, one in _points(result).items():
        sizes = (one.get(f"{kind}_bytes") for kind in ("planned", "allocated", "reserved"))
        cells = (f"{size / 1e9:.2f} GB" if size else "-" for size in sizes)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _speed_rows(result: dict[str, Any]) -> list[str]:
    """Tokens a second of one row of 2,048 tokens, by what is recomputed."""
    parts = result["parts"]
    sides = parts.get("peft", {})
    lines = [
        f"| 1 x 2048, recomputed | qlora_kit | {' | '.join(SIDES.values())} | times as fast |",
        "|---|---:|---:|---:|---:|",
    ]
    for level in ("none", "full"):
        ours = parts.get("speed", {}).get("points", {}).get(f"llama3.1-8b, 1 x 2048, {level}")
        others = [sides.get(name if "," in name else f"{name}, {level}") for name in SIDES]
        cells = [f"{one['tokens_per_s']:,.0f}" if one else "-" for one in (ours, *others)]
        times = [
            f"{ours['tokens_per_s'] / one['tokens_per_s']:.2f}" if ours and one else "-"
            for one in others
        ]
        lines.append(f"| {level} | {' | '.join(cells)} | {', '.join(times)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=RESULT, help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="(%(default)s)")
    given = parser.parse_args()
    found = json.loads(given.result.read_text()) if given.result.exists() else None
    text = rendered(found)
    page = given.page.read_text()
    given.page.write_text(MARKS.sub(lambda marks: f"{marks[1]}{text}{marks[2]}", page))


if __name__ == "__main__":
    main()

"""The tables that say what a card showed, from the result of `gpu.py`.

    python benchmarks/gpu_table.py      # benchmarks/results/gpu.json into README.md, here and above

Without a result they say that CUDA was not run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "gpu.json"
MARKS = re.compile(r"(<!-- cuda -->\n).*?(<!-- /cuda -->)", re.S)
NOT_RUN = (
    "It is written for CUDA. **So far everything was measured on CPUs: the CUDA path has not been "
    "run.**\n"
)
NO_POINTS = "It was not run on a card yet.\n"
MODELS, LEVELS = ("llama3.1-8b", "llama2-7b"), ("none", "full")
SIDES = {"peft_guide, full": "PEFT as its guide says", "peft_best": "PEFT at its best"}


def short(result: dict[str, Any] | None) -> str:
    """What the README says: in words, and steps of one row of 2,048 tokens.

    Errors: `ValueError` for a result of a CPU or of small models.
    """
    if result is None:
        return NOT_RUN
    return "\n".join([_words(_of_a_card(result)), "", *_rows(result), ""])


def whole(result: dict[str, Any] | None) -> str:
    """Every step whose bytes were planned and measured; errors are those of `short`."""
    if result is None:
        return NO_POINTS
    lines = ["| step | planned | allocated | reserved |", "|---|---:|---:|---:|"]
    for name, one in _points(_of_a_card(result)).items():
        cells = (_gigabytes(one, kind) for kind in ("planned", "allocated", "reserved"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


PAGES = {HERE.parent / "README.md": short, HERE / "README.md": whole}
"""What stands between the marks of each page."""


def _of_a_card(result: dict[str, Any]) -> dict[str, Any]:
    if result["device"] != "cuda" or result["small"]:
        raise ValueError("this result is not that of a card with the real shapes")
    return result


def _words(result: dict[str, Any]) -> str:
    parts = result["parts"]
    card = parts.get("start", {}).get("card", {}).get("name", "card")
    errors = [abs(one["error"]) for one in _points(result).values() if "error" in one]
    off = f" Plans are off by {max(errors):.1%} at most." if errors else ""
    decoded = [
        f"{parts['decode'][name]['tokens_per_s']:,.0f} with {shown}"
        for name, shown in {"1 rows": "1 row", "8 rows": "8 rows"}.items()
        if name in parts.get("decode", {})
    ]
    decoding = f" Decoded tokens a second (8B): {', '.join(decoded)}." if decoded else ""
    return (
        f"It is written for CUDA, and was measured on one {card} (`benchmarks/gpu.py`): random "
        "weights of the real shapes, 4 bits, r 16 on all linears, AdamW, one row of 2,048 tokens. "
        f"PEFT's figures are for the same step, tokens a second.{off}{decoding}"
    )


def _points(result: dict[str, Any]) -> dict[str, Any]:
    parts = result["parts"]
    names = ("memory", "memory_7b")
    return {k: v for name in names for k, v in parts.get(name, {}).get("points", {}).items()}


def _rows(result: dict[str, Any]) -> list[str]:
    titles = ("shape", "recomputed", "planned", "allocated", "tokens/s", *SIDES.values())
    lines = [f"| {' | '.join(titles)} |", "|---|---|" + "---:|" * (len(titles) - 2)]
    parts = result["parts"]
    for model in MODELS:
        for level in LEVELS:
            step = f"{model}, 1 x 2048, {level}"
            point, steps = _points(result).get(step, {}), parts.get("speed", {}).get("points", {})
            cells = [_gigabytes(point, kind) for kind in ("planned", "allocated")]
            ours = steps.get(step)
            cells.append(f"{ours['tokens_per_s']:,.0f}" if ours else "-")
            for name in SIDES:
                peft = parts.get("peft", {}).get(name if "," in name else f"{name}, {level}")
                cells.append(_against(ours, peft))
            lines.append(f"| {model} | {level} | {' | '.join(cells)} |")
    return lines


def _against(ours: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Tokens a second of another side, and how many times as fast ours is."""
    if not ours or not other:
        return "-"
    times = ours["tokens_per_s"] / other["tokens_per_s"]
    return f"{other['tokens_per_s']:,.0f} (x {times:.2f})"


def _gigabytes(point: dict[str, Any], kind: str) -> str:
    size = point.get(f"{kind}_bytes")
    return f"{size / 1e9:.2f} GB" if size else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=RESULT, help="(%(default)s)")
    given = parser.parse_args()
    found = json.loads(given.result.read_text()) if given.result.exists() else None
    for page, text_of in PAGES.items():
        text = text_of(found)
        page.write_text(
            MARKS.sub(lambda marks, text=text: f"{marks[1]}{text}{marks[2]}", page.read_text())
        )


if __name__ == "__main__":
    main()

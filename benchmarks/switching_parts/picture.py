"""What a switch, a step and a prompt take, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, PEFT, OTHER = "#0072B2", "#D55E00", "#56B4E9"  # Okabe and Ito, 2008


def draw(path: Path, result: dict[str, Any]) -> None:
    """Microseconds a switch, with a log axis, and milliseconds of 8 rows. Errors: `ImportError`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    switches, step, prompt = figure.subplots(1, 3, width_ratios=(1, 1.2, 1.2))
    rows = [row for row in result["switches"] if row["adapters"] == result["most_adapters"]]
    for place, row in enumerate(rows):
        for shift, key, colour, label in (
            (-0.2, "ours_us", OURS, "bank.use"),
            (0.2, "peft_us", PEFT, "PEFT set_adapter"),
        ):
            height = row[key][max(row[key])]
            switches.bar(place + shift, height, 0.4, color=colour, label=label if not place else "")
            shown = f"{height:,.2f}" if height < 10 else f"{height:,.0f}"
            switches.text(place + shift, height, shown, ha="center", va="bottom", fontsize=9)
    switches.set_yscale("log")
    switches.set_ylim(top=2e7)  # room for the legend
    switches.set_ylabel("microseconds a switch")
    switches.set_xticks(range(len(rows)), [f"{r['modules']} linears" for r in rows])
    switches.set_title(f"a switch among {result['most_adapters']} adapters", fontsize=11)
    switches.legend(frameon=False, fontsize=9)
    sides = result["tokens"]["sides"]
    for axes, key, title in (
        (step, "step_ms", "a decoding step of 8 rows"),
        (prompt, "prompt_ms", "8 prompts of 64 tokens"),
    ):
        names = list(sides)[::-1]
        heights = [sides[name][key] for name in names]
        colours = [PEFT if "PEFT" in name else OURS if name == "mixed" else OTHER for name in names]
        axes.barh(range(len(names)), heights, color=colours)
        for place, height in enumerate(heights):
            axes.text(height, place, f" {height:,.0f}", va="center", fontsize=8)
        labels = [name.replace(": ", ":\n") for name in names] if axes is step else []
        axes.set_yticks(range(len(names)), labels or [""] * len(names), fontsize=8)
        axes.set_xlabel("milliseconds")
        axes.set_xlim(0, 1.15 * max(heights))
        axes.set_title(title, fontsize=11)
    for axes in (switches, step, prompt):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)

"""Tables and pictures of bytes by component: several settings, one step over time, many budgets.

Pictures need matplotlib (the extra `plots`), which is imported where one is drawn. Components are
stacked in the order of `ORDER`, what stays in memory the longest at the bottom, in colours that are
told apart without red and green (Okabe and Ito, 2008); the legend has them in the order of the
stack, the topmost first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.memory.counter import Sizes
from qlora_kit.pictures import COMPONENTS

GIB, MIB = 1024**3, 1024**2
ORDER = COMPONENTS | {"adapters": ("adapters", "#000000")}
"""Every component's name for people and its colour, from the bottom of a stack to its top.

Adapters are black here, where the page is white.
"""


@dataclass(frozen=True)
class Bar:
    """One setting: its group, its own label, and what was in memory at its peak."""

    group: str
    label: str
    at_peak: Sizes


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(titles), line(rule), *map(line, rows)])


def draw_bars(path: Path, title: str, bars: Sequence[Bar]) -> None:
    """A stacked bar for each setting, groups side by side, in GiB, or MiB where all are small.

    Errors: `ImportError` without matplotlib.
    """
    from matplotlib.figure import Figure

    unit, name = _unit(max(sum(bar.at_peak.values()) for bar in bars))
    figure = Figure(figsize=(max(6.0, 1.6 + 0.62 * len(bars)), 4.8), layout="constrained")
    axes = figure.subplots()
    places = _places(bars)
    for place, bar in zip(places, bars, strict=True):
        bottom = 0.0
        for component, (_, colour) in ORDER.items():
            height = bar.at_peak.get(component, 0) / unit
            axes.bar(place, height, 0.8, bottom, color=colour, edgecolor="white", linewidth=0.4)
            bottom += height
        axes.text(place, bottom, f"{bottom:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(places, [bar.label for bar in bars], rotation=35, ha="right", fontsize=8)
    for group in dict.fromkeys(bar.group for bar in bars):
        own = [place for place, bar in zip(places, bars, strict=True) if bar.group == group]
        axes.text(
            sum(own) / len(own),
            1.01,
            group,
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=9,
            fontweight="bold",
        )
    axes.set_ylabel(f"live bytes at the peak of a step, {name}")
    axes.set_title(title, pad=22, fontsize=11)
    _finish(axes, {key for bar in bars for key, size in bar.at_peak.items() if size})
    figure.savefig(path, dpi=150)


def draw_step(path: Path, title: str, intervals: Sequence[Mapping[str, Any]]) -> None:
    """What is in memory from place to place of one step, stacked, with its peak marked.

    `intervals` have `phase`, `module` and `at_peak`, in the order of time. Errors: `ImportError`
    without matplotlib.
    """
    from matplotlib.figure import Figure

    totals = [sum(one["at_peak"].values()) for one in intervals]
    unit, name = _unit(max(totals))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    # A place of the step is as wide as any other: the axis has the order, not the seconds.
    edges = range(len(intervals) + 1)
    bottom = [0.0] * len(intervals)
    for component, (_, colour) in ORDER.items():
        sizes = [one["at_peak"].get(component, 0) / unit for one in intervals]
        top = [low + size for low, size in zip(bottom, sizes, strict=True)]
        low, high = [*bottom, bottom[-1]], [*top, top[-1]]
        axes.fill_between(edges, low, high, step="post", color=colour, linewidth=0)
        bottom = top
    first = totals.index(max(totals))
    where = f"{intervals[first]['phase']} {intervals[first]['module']}".strip()
    axes.axhline(totals[first] / unit, color="black", linewidth=0.7, linestyle=":")
    axes.text(
        0.01,
        totals[first] / unit,
        f"peak {totals[first] / unit:.3g} {name}: {where}",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        fontsize=9,
    )
    _phases(axes, [one["phase"] for one in intervals])
    axes.set_ylim(0, 1.12 * totals[first] / unit)
    axes.set_ylabel(f"live bytes, {name}")
    axes.set_xlabel("places of the step, in their order", labelpad=24)
    axes.set_title(title, fontsize=11)
    _finish(axes, {key for one in intervals for key, size in one["at_peak"].items() if size})
    figure.savefig(path, dpi=150)


def draw_budgets(path: Path, title: str, budgets: Sequence[Mapping[str, Any]]) -> None:
    """What was used of each budget, above the tokens a second that it gave; refusals are crosses.

    `budgets` have `budget_bytes` and `fits`; those that fit `counted_bytes` and `tokens_per_s`.
    Errors: `ImportError` without matplotlib.
    """
    from matplotlib.figure import Figure

    unit, name = _unit(max(one["budget_bytes"] for one in budgets))
    fitting = [one for one in budgets if one["fits"]]
    refused = [one["budget_bytes"] / unit for one in budgets if not one["fits"]]
    given = [one["budget_bytes"] / unit for one in fitting]
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    used, speed = figure.subplots(2, 1, sharex=True)
    ends = [min(given + refused), max(given + refused)]
    used.plot(ends, ends, color="black", linewidth=0.7, linestyle=":", label="the whole budget")
    counted = [one["counted_bytes"] / unit for one in fitting]
    used.plot(given, counted, "o-", color="#0072B2", label="counted in a step")
    if refused:
        height = [min(counted, default=0)] * len(refused)
        used.plot(refused, height, "x", color="#D55E00", label="refused")
    used.set_ylabel(f"peak of a step, {name}")
    used.set_title(title, fontsize=11)
    used.legend(frameon=False, fontsize=9)
    speed.plot(given, [one["tokens_per_s"] for one in fitting], "o-", color="#009E73")
    speed.set_ylabel("tokens a second")
    speed.set_ylim(bottom=0)
    speed.set_xlabel(f"memory budget, {name}")
    for axes in (used, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def _unit(largest: int) -> tuple[int, str]:
    return (GIB, "GiB") if largest >= GIB // 10 else (MIB, "MiB")


def _places(bars: Sequence[Bar]) -> list[float]:
    """Where bars stand: one apart, groups a little more."""
    places, place = [], 0.0
    for before, bar in zip([None, *bars], bars, strict=False):
        if before is not None:
            place += 1.0 if before.group == bar.group else 1.6
        places.append(place)
    return places


def _phases(axes: Any, phases: Sequence[str]) -> None:
    """Lines where a phase begins, and its name below it."""
    starts = [i for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
    for start, end in zip(starts, [*starts[1:], len(phases)], strict=True):
        axes.axvline(start, color="black", linewidth=0.6)
        axes.text(
            (start + end) / 2 if end - start > 2 else end,
            -0.03,
            phases[start],
            transform=axes.get_xaxis_transform(),
            ha="center" if end - start > 2 else "right",
            va="top",
            fontsize=9,
        )
    axes.set_xticks([])
    axes.set_xlim(0, len(phases))


def _finish(axes: Any, present: set[str]) -> None:
    from matplotlib.patches import Patch

    shown = [ORDER[component] for component in reversed(ORDER) if component in present]
    handles = [Patch(color=colour, label=label) for label, colour in shown]
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)

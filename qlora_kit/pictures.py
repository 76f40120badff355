"""Pictures drawn from numbers alone, readable on a light and on a dark page.

The page shows through, and what is written and drawn is told apart without red and green (Okabe
and Ito, 2008). matplotlib (the extras `plots` and `notebook`) is imported where something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sizes = Mapping[str, int]
"""Bytes by component."""
MIB = 1024**2
INK = "#808080"
"""Of texts and lines: as far from white as from black."""
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
COMPONENTS = {
    "weights_quantized": ("quantized weights", BLUE),
    "weights_other": ("other weights", "#56B4E9"),
    "adapters": ("adapters", "#B59B00"),
    "gradients": ("gradients", "#D55E00"),
    "optimizer": ("optimizer states", ORANGE),
    "workspace": ("workspace", "#999999"),
    "activations": ("activations", GREEN),
    "loss": ("head and loss", PINK),
}
"""Every component's name for people and its colour, what stays the longest first."""


def png(figure: Figure) -> bytes:
    """A figure as an image with nothing behind it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, transparent=True)
    return file.getvalue()


def update_figure(singular: Sequence[float], errors: Mapping[int, float], shape: Any) -> Figure:
    """Singular values of an update (out, in), and the error that each rank leaves, as shares."""
    figure, (left, right) = _figure(2, width=9)
    left.plot(range(1, len(singular) + 1), singular, color=BLUE)
    left.set_yscale("log")
    left.set_xlabel("singular values, the largest first", color=INK)
    left.set_title("what the update is made of", color=INK, fontsize=11)
    places = range(len(errors))
    right.bar(places, [100 * error for error in errors.values()], color=ORANGE)
    out_features, in_features = shape
    whole = out_features * in_features
    names = [f"r {r}\n{r * (out_features + in_features) / whole:.0%}" for r in errors]
    right.set_xticks(places, names)
    right.set_xlabel("rank, and the numbers it takes of those of the whole", color=INK)
    right.set_ylabel("% of the update missing", color=INK)
    right.set_title(f"{out_features} x {in_features} = {whole:,} numbers", color=INK, fontsize=11)
    return figure


def loading_figure(held: Mapping[int, Sizes]) -> Figure:
    """Bytes of the base by the bits it is held in: linears of layers, and what stays in 16 bits."""
    figure, (axes,) = _figure(1, width=6)
    for place, sizes in enumerate(held.values()):
        top = 0.0
        for component, (_, colour) in COMPONENTS.items():
            height = sizes.get(component, 0) / MIB
            axes.bar(place, height, 0.7, top, color=colour)
            top += height
        axes.text(place, top, f"{top:.2f}", ha="center", va="bottom", color=INK)
    axes.set_xticks(range(len(held)), [f"{bits} bits" for bits in held])
    axes.set_ylabel("MiB", color=INK)
    axes.margins(y=0.1)
    names = {"weights_quantized": "linears of layers", "weights_other": "embedding, head, norms"}
    _legend(axes, {name for sizes in held.values() for name in sizes}, names)
    return figure


def step_figure(planned: Sequence[Mapping[str, Any]], measured: Sequence[Any]) -> Figure:
    """What is in memory from place to place of a step: as planned, and as counted.

    Both have `phase`, `module` and `at_peak`, bytes by component, in the order of time.
    """
    figure, both = _figure(2, width=11, shared=True)
    for axes, title, places in ((both[0], "planned", planned), (both[1], "measured", measured)):
        bottom = [0.0] * len(places)
        edges = range(len(places) + 1)
        for component, (_, colour) in COMPONENTS.items():
            sizes = [one["at_peak"].get(component, 0) / MIB for one in places]
            top = [low + size for low, size in zip(bottom, sizes, strict=True)]
            low, high = [*bottom, bottom[-1]], [*top, top[-1]]
            axes.fill_between(edges, low, high, step="post", color=colour, linewidth=0)
            bottom = top
        highest = max(range(len(bottom)), key=bottom.__getitem__)
        place = f"{places[highest]['phase']} {places[highest]['module']}".strip()
        said = f"{title}: peak {max(bottom):.1f} MiB, {place}"
        axes.set_title(said, color=INK, fontsize=11)
        first = {one["phase"]: at for at, one in reversed(list(enumerate(places)))}
        axes.set_xticks([*first.values()], [*first], ha="left")
    both[0].set_ylabel("MiB", color=INK)
    _legend(both[1], {name for one in planned for name, size in one["at_peak"].items() if size})
    return figure


def training_figure(
    steps: Sequence[Mapping[str, float]],
    held_out: Sequence[tuple[int, float]],
    total: int,
    memory_is: str,
) -> Figure:
    """Loss and rate of each step, tokens a second and memory, up to step `total`.

    `memory_is` says what the bytes are those of.
    """
    figure, (loss, rate, speed, memory) = _figure(4, width=14)
    numbers = [one["step"] for one in steps]
    rate.plot(numbers, [one["learning_rate"] for one in steps], color=ORANGE)
    loss.plot(numbers, [one["loss"] for one in steps], color=BLUE, label="trained on")
    if held_out:
        loss.plot(*zip(*held_out, strict=True), "o", color=ORANGE, label="held out", clip_on=False)
    speed.plot(numbers, [one["tokens_per_s"] for one in steps], color=GREEN)
    memory.plot(numbers, [one["peak_bytes"] / MIB for one in steps], color=PINK)
    titles = ("loss", "learning rate", "tokens/s", f"memory: {memory_is}, MiB")
    for axes, title in zip((loss, rate, speed, memory), titles, strict=True):
        axes.set_xlim(0, total)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=INK)
        axes.set_title(title, color=INK, fontsize=11)
    loss.legend(frameon=False, labelcolor=INK)
    return figure


def switching_figure(seconds: Mapping[str, float]) -> Figure:
    """How long each thing takes, in microseconds, on a scale of powers of ten."""
    figure, (axes,) = _figure(1, width=8, height=2.2)
    places = range(len(seconds))
    found = [1e6 * one for one in seconds.values()]
    axes.barh(places, found, color=BLUE)
    axes.set_xscale("log")
    axes.set_yticks(places, [*seconds])
    axes.invert_yaxis()
    axes.grid(visible=False)
    for place, one in zip(places, found, strict=True):
        axes.text(one, place, f" {one:,.1f} us", va="center", color=INK)
    axes.set_xlim(right=8 * max(found))
    axes.set_xlabel("microseconds", color=INK)
    return figure


def _figure(
    count: int, width: float, height: float = 3.4, *, shared: bool = False
) -> tuple[Figure, Sequence[Any]]:
    """A figure with axes side by side, nothing behind them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    every = figure.subplots(1, count, squeeze=False, sharey=shared)[0]
    for axes in every:
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, every


def _legend(axes: Any, present: set[str], names: Mapping[str, str] | None = None) -> None:
    from matplotlib.patches import Patch

    shown = [COMPONENTS[name] for name in reversed(COMPONENTS) if name in present]
    said = {COMPONENTS[key][0]: name for key, name in (names or {}).items()}
    handles = [Patch(color=colour, label=said.get(label, label)) for label, colour in shown]
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor=INK
    )

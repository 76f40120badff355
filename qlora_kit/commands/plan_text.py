"""A memory plan on a terminal: by component, with its peak's place, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qlora_kit.commands.progress import size
from qlora_kit.commands.terminal import Terminal, styled

if TYPE_CHECKING:
    from qlora_kit.plan.plan import MemoryPlan, Planner
    from qlora_kit.plan.suggest import Options, Suggestion

SHOWN = {
    "weights_quantized": "quantized linears",
    "weights_other": "embeddings, head, norms",
    "adapters": "adapters (fp32 masters)",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "paged": "paged states, outside the card",
    "activations": "activations",
    "loss": "loss",
    "workspace": "workspace",
    "overhead": "outside tensors",
}
OVER = "!"


def print_plan(
    options: Options,
    planner: Planner,
    plan: MemoryPlan,
    suggestions: Sequence[Suggestion],
    grid: Sequence[dict[str, Any]] | None,
) -> None:
    """Print all of it."""
    terminal = Terminal()
    training = options.training
    terminal.print(
        (options.base.model, "bold"),
        f", {options.base.bits} bits, "
        f"{training.batch_size} x {options.length} tokens, on {plan.device}",
    )
    table = Table(show_edge=False)
    for title in ("component", "most in a step", "at the peak"):
        table.add_column(title, justify="left" if title == "component" else "right")
    for name, shown in SHOWN.items():
        most, there = plan.bytes.get(name, 0), plan.at_peak.get(name, 0)
        if most or there:
            table.add_row(shown, size(most) if most else "", size(there) if there else "")
    table.add_row("peak", "", size(plan.peak_bytes), style="bold")
    terminal.show(table)
    terminal.print(f"peak in {plan.place}")
    again = f"{plan.recomputed:.0%} of a forward pass is done again"
    terminal.print(f"gradient checkpointing: {plan.recompute}; {again}")
    terminal.print(f"host memory of loading: {size(plan.host_peak_bytes)}")
    terminal.print(f"outside tensors: {planner.overhead.source}")
    if plan.device == "cpu" and options.base.device == "auto":
        terminal.print(
            "planned for the CPU, for no GPU is here: --device cuda or --device_memory SIZE plans "
            "for a card"
        )
    if plan.budget_bytes is not None:
        word = ("fits", "green") if plan.fits else ("does not fit", "red")
        margin = "tensors are counted, so no margin is left"
        if plan.margin_bytes:
            margin = f"with a margin of {size(plan.margin_bytes)}"
        terminal.print(word, f": {size(plan.peak_bytes)} of {size(plan.budget_bytes)}, {margin}")
    for one in suggestions:
        terminal.print(f"  {one.change}: {size(one.plan.peak_bytes)}")
    if not plan.fits and not suggestions:
        terminal.print("  no change of these options makes it fit: take a smaller base")
    if grid is not None:
        terminal.show(_grid_table(grid))
        if not all(cell["plan"].fits for cell in grid):
            terminal.print(f"{OVER} does not fit {size(grid[0]['plan'].budget_bytes)}")


def _grid_table(grid: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="peak by batch and length", title_justify="left", show_edge=False)
    rows = sorted({cell["batch_size"] for cell in grid})
    table.add_column("length", justify="right")
    for count in rows:
        table.add_column(f"batch {count}", justify="right")
    for length in sorted({cell["max_length"] for cell in grid}):
        cells = [cell["plan"] for cell in grid if cell["max_length"] == length]
        # A mark as well as a colour, which not every terminal and no file has.
        shown = (
            styled((size(plan.peak_bytes), "green"))
            if plan.fits
            else styled((f"{OVER} {size(plan.peak_bytes)}", "red"))
            for plan in cells
        )
        table.add_row(str(length), *shown)
    return table

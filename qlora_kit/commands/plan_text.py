"""A memory plan on a terminal: by component, with its peak's place, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from qlora_kit.commands.terminal import Terminal, size, table_of

if TYPE_CHECKING:
    from qlora_kit.config.training import TrainingConfig
    from qlora_kit.plan.answer import Answer
    from qlora_kit.plan.grid import Cell
    from qlora_kit.plan.longest import Longest
    from qlora_kit.plan.memory_plan import MemoryPlan
    from qlora_kit.plan.quantization_error import QuantizationErrors

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
OVER, LIMIT = "!", "*"
WORST_SHOWN = 20
"""Linears in the table of errors; `--json` has all."""
LEAST_SHOWN = 0.005
"""The share of a step's time from which its kind is named."""
NAMED = 5
"""Linears that are named as a flag has them."""


def print_plan(answer: Answer, terminal: Terminal) -> None:
    """Print all of it."""
    options, plan, grid = answer.options, answer.plan, answer.grid
    training = options.training
    terminal.print(
        (options.base.model, "bold"),
        f", {options.base.bits} bits, {_batch(training, options.length)}, "
        f"{training.gradient_accumulation_steps} times a step, on {plan.device}",
    )
    table = table_of("component", "most in a step", "at the peak", left=["component"])
    is_whole = options.base.bits == 16
    names = SHOWN | {"weights_other": "weights, not quantized"} if is_whole else SHOWN
    for name, shown in names.items():
        most, there = plan.bytes.get(name, 0), plan.at_peak.get(name, 0)
        if most or there:
            table.add_row(shown, size(most) if most else "", size(there) if there else "")
    table.add_row("peak", "", size(plan.peak_bytes), style="bold")
    terminal.show(table)
    if answer.left is not None:
        terminal.print(answer.left)
    for note in answer.notes:
        terminal.note(note)
    terminal.print(f"peak in {plan.place}")
    again = f"{plan.recomputed:.0%} of a forward pass is done again"
    terminal.print(f"gradient checkpointing: {plan.recompute}; {again}")
    terminal.print(f"optimizer: {plan.optimizer}")
    _print_time(answer, terminal)
    if placed := plan.placed(size):
        terminal.print(f"placement: {placed}")
    load, step = (size(plan.host[name]) for name in ("load", "step"))
    terminal.print(f"host memory: {load} in loading, {step} in a step")
    terminal.print(f"outside tensors: {answer.overhead}")
    if plan.device == "cpu" and options.base.device == "auto":
        terminal.print(
            "planned for the CPU, for no GPU is here: --device cuda or --device_memory SIZE plans "
            "for a card"
        )
    _print_fit(answer, terminal)
    if grid is not None:
        terminal.show(_grid_table("peak by batch and length", grid, training, _peak))
        if plan.time is not None:
            terminal.show(_grid_table("tokens/s by batch and length", grid, training, _speed))
        if not all(cell.plan.fits for cell in grid):
            budget = grid[0].plan.budget_bytes
            assert budget is not None
            terminal.print(f"{OVER} does not fit {size(budget)}")
    if answer.longest is not None:
        terminal.show(_longest_table(answer.longest))
        if any(one.is_most for one in answer.longest):
            terminal.print(f"{LIMIT} all of the model's context")
        if any(not one.tokens for one in answer.longest):
            terminal.print("- fits at no length")
    if answer.errors is not None:
        _print_errors(answer.errors, terminal)


def _batch(training: TrainingConfig, length: int) -> str:
    """A micro-batch in words: its rows, or its pairs of rows."""
    if not training.pairs:
        return f"{training.rows} x {length} tokens"
    return f"{_counted(training.rows, training)} of 2 x {length} tokens"


def _counted(count: int, training: TrainingConfig) -> str:
    """So many rows of a batch, or so many pairs."""
    if not training.pairs:
        return f"batch {count}"
    return f"{count} pair{'' if count == 1 else 's'}"


def _print_fit(answer: Answer, terminal: Terminal) -> None:
    """Whether the run fits, and what would make it fit."""
    plan = answer.plan
    if plan.budget_bytes is not None:
        word = ("fits", "green") if plan.fits else ("does not fit", "red")
        margin = "tensors are counted, so nothing is kept free"
        if plan.margin_bytes:
            margin = f"of which {size(plan.margin_bytes)} are kept free"
        terminal.print(word, f": {size(plan.peak_bytes)} of {size(plan.budget_bytes)}, {margin}")
    if plan.host_budget_bytes is not None:
        verdict = "do not fit" if plan.missing_on_host_bytes else "fit"
        free = size(plan.host_budget_bytes)
        terminal.print(f"on the host {size(plan.host['step'])} {verdict}: {free} are free")
        if plan.host_wanted_bytes is not None:
            wanted = size(plan.host_wanted_bytes)
            terminal.print(f"with {wanted} free on the host it would fit on the device")
    for one in answer.suggestions:
        terminal.print(f"  {one.change}: {size(one.plan.peak_bytes)}")
    if not plan.fits and not answer.suggestions:
        apart = plan.at_peak.get("overhead", 0) + plan.margin_bytes
        change = "  no change of these options makes it fit: take a smaller base"
        if apart >= (plan.budget_bytes or math.inf):
            change = f"  no base fits: {size(apart)} lie outside tensors or are kept free"
        terminal.print(change)


def _print_time(answer: Answer, terminal: Terminal) -> None:
    """What a step takes on a known card, and where its time goes."""
    time = answer.plan.time
    if time is None:
        return
    parts = sorted(time.seconds.items(), key=lambda part: -part[1])
    shown = ((kind, taken / time.total_s) for kind, taken in parts)
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in shown if share >= LEAST_SHOWN)
    terminal.print(
        f"about {time.tokens_per_s:,.0f} tokens/s on {time.card}, {_length(time.total_s)} a step "
        f"of {time.tokens:,} tokens: {shares}"
    )
    if answer.hours is not None:
        terminal.print(f"about {_length(answer.hours * 3600)} for the run")
    terminal.print("times are an estimate from a table of cards, measured on none of them yet")


def _length(seconds: float) -> str:
    """A time in words, in the unit that it is in best."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.2g} minutes" if seconds < 3600 else f"{seconds / 3600:,.3g} hours"


def _print_errors(errors: QuantizationErrors, terminal: Terminal) -> None:
    """The worst linears, then a line a kind of projection, then what skipping costs."""
    form = f"{errors.quantization.bits} bits"
    title = f"relative error of the linears in {form}, the worst first"
    columns = ("linear", "error", f"in {errors.dtype}", f"in {form}")
    table = table_of(*columns, left=["linear"], title=title)
    for one in errors.linears[:WORST_SHOWN]:
        sizes = size(one.bytes_unquantized), size(one.bytes_quantized)
        table.add_row(one.name, f"{one.error:.2%}", *sizes)
    terminal.show(table)
    titles = ("projection", "linears", "median", "worst", "in")
    title = "by projection, the worst median first"
    kinds = table_of(*titles, left=["projection", "in"], title=title)
    for kind in errors.kinds:
        worst = f"{kind.worst.error:.2%}"
        kinds.add_row(kind.name, str(kind.count), f"{kind.median:.2%}", worst, kind.worst.name)
    terminal.show(kinds)
    for chosen, added in errors.skips:
        which = "the worst" if len(chosen) == 1 else f"the {len(chosen)} worst"
        if len(chosen) <= NAMED:
            which = ",".join(one.name for one in chosen)
        terminal.print(f"--skip_modules {which} takes {size(added)} more")


def _grid_table(
    title: str,
    grid: Sequence[Cell],
    training: TrainingConfig,
    shown: Callable[[MemoryPlan], Text],
) -> Table:
    """A row a length and a column a batch, with what is `shown` of the plan of both."""
    rows = sorted({cell.batch_size for cell in grid})
    table = table_of("length", *(_counted(count, training) for count in rows), title=title)
    for length in sorted({cell.max_length for cell in grid}):
        cells = (shown(cell.plan) for cell in grid if cell.max_length == length)
        table.add_row(str(length), *cells)
    return table


def _peak(plan: MemoryPlan) -> Text:
    # A mark as well as a colour, which not every terminal and no file has.
    peak = size(plan.peak_bytes)
    return Text(peak, "green") if plan.fits else Text(f"{OVER} {peak}", "red")


def _speed(plan: MemoryPlan) -> Text:
    return Text(f"{plan.time.tokens_per_s:,.0f}" if plan.time and plan.fits else "-")


def _longest_table(found: Sequence[Longest]) -> Table:
    levels = list(dict.fromkeys(one.level for one in found))
    titles = ("placement", *levels, "host memory")
    table = table_of(*titles, left=["placement"], title="longest rows that fit")
    for placement in dict.fromkeys(one.plan.placement for one in found):
        tokens = {one.level: one for one in found if one.plan.placement == placement}
        shown = (_rows(tokens[level]) if level in tokens else "" for level in levels)
        last = tokens[levels[-1]]
        # What moves nothing at one level may move something at another.
        words = max((one.plan.in_effect for one in tokens.values()), key=astuple).words
        host = size(last.plan.host_peak_bytes) if last.tokens else ""
        table.add_row(words or "all on the device", *shown, host)
    return table


def _rows(found: Longest) -> str:
    """The length of its rows, marked where it is the context."""
    if not found.tokens:
        return "-"
    return f"{found.tokens:,}{f' {LIMIT}' if found.is_most else ''}"

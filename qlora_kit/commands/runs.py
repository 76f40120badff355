"""`qlora-kit runs`: the runs of a directory as a table, or two of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal, size, table_of
from qlora_kit.config.commands import RunsConfig
from qlora_kit.run.runs import Comparison, FoundRun, compare, find_runs

SUMMARY = "List the runs of a directory with what they gave, or compare two of them."
SHOWN = ("model", "data", "bits")
"""Options that have a column; the others are in --json and in a comparison."""


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    asked = parse("qlora-kit runs", SUMMARY, (RunsConfig,), argv)[RunsConfig]
    directory, terminal = Path(asked.runs_dir), Terminal()
    if asked.compare:
        found = compare(directory, asked.compare)
        if asked.json:
            terminal.json(found.as_json(), indent=2)
        else:
            _show_both(found, terminal)
        return 0
    runs = find_runs(directory)
    if asked.json:
        terminal.json([run.as_json() for run in runs], indent=2)
    else:
        _show_all(runs, terminal)
    return 0


def _show_all(runs: Sequence[FoundRun], terminal: Terminal) -> None:
    table = table_of()
    table.add_column("run", no_wrap=True)  # a name is copied
    for title, least in zip(SHOWN, (5, 6, 4), strict=True):
        table.add_column(title, overflow="fold", min_width=least)
    for title in LISTED:
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        # Of paths, hub ids and samples the last part.
        said = (
            str(run.options.get(name) or "").rpartition("/")[2].rpartition(":")[2] for name in SHOWN
        )
        name = run.name if run.state == "finished" else f"{run.name}\n({run.state})"
        table.add_row(name, *said, *(shown(run) for shown in LISTED.values()))
    terminal.show(table)
    for run in runs:
        if run.problem is not None:
            terminal.note(f"{run.name}: {run.problem}")


def _show_both(found: Comparison, terminal: Terminal) -> None:
    """The options that differ, then the figures, a column a run."""
    table = table_of("", left=[""])
    for run in found.runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for name, values in found.options.items():
        table.add_row(name, *("" if value is None else str(value) for value in values))
    if found.options:
        table.add_section()
    for title, shown in FIGURES.items():
        table.add_row(title, *(shown(run) for run in found.runs))
    terminal.show(table)
    if not found.options:
        terminal.print("no option differs")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _peak(run: FoundRun) -> str:
    return "" if run.peak_bytes is None else size(run.peak_bytes)


def _losses(run: FoundRun) -> str:
    """Before and after; of a run that is not finished that of its last step."""
    if run.loss_after is None:
        return _number(run.last_loss, ".2f")
    return f"{_number(run.loss_before, '.2f')} > {run.loss_after:.2f}"


LISTED: dict[str, Callable[[Any], str]] = {
    "loss": _losses,
    "memory": _peak,
    "time": lambda run: _time(run.seconds),
}
"""What the table has of a run by its title, so that it fits 80 columns."""
FIGURES: dict[str, Callable[[Any], str]] = {
    "steps": lambda run: _number(run.steps, ","),
    "loss before": lambda run: _number(run.loss_before, ".4f"),
    "loss after": lambda run: _number(run.loss_after, ".4f"),
    "last step's loss": lambda run: _number(run.last_loss, ".4f"),
    "memory": _peak,
    "time": lambda run: _time(run.seconds),
    "tokens/s": lambda run: _number(run.tokens_per_s, ",.0f"),
}
"""What a comparison has: held-out losses, that of the last step, the peak of tensors, the time."""

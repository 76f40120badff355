"""`qlora-kit runs`: the runs of a directory as a table, or two of them side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal, size, table_of
from qlora_kit.config.commands import RunsConfig
from qlora_kit.run.runs import FINISHED, Comparison, FoundRun, compare, find_runs

SUMMARY = "List the runs of a directory with what they gave, or compare two of them."
SHOWN = ("model", "data", "bits")
"""Options that have a column; the others are in --json and in a comparison."""
DROPPED = ("data", "model", "bits")
"""Those whose column goes where a line has no room for it, in this order: many names hold them."""
LEAST_NAME = 16
"""Characters of a run's name in a line, whatever else there is."""
IN_NAMES, IN_VALUES = "_-", "/, "
"""After which characters a line may end: of the name of a run, of a path or a list."""


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
    states = ["" if run.state == FINISHED else f"\n({run.state})" for run in runs]
    cells = {"run": [run.name + state for run, state in zip(runs, states, strict=True)]}
    for name in SHOWN:
        said = (str(run.options.get(name) or "") for run in runs)
        # Of paths, hub ids and samples the last part.
        cells[name] = [text.rpartition("/")[2].rpartition(":")[2] for text in said]
    cells |= {title: [shown(run) for run in runs] for title, shown in LISTED.items()}
    for title in DROPPED:
        if _width(cells) > terminal.width:
            del cells[title]
    room = terminal.width - _width({**cells, "run": []}) + len("run")
    names = (in_lines(run.name, max(room, LEAST_NAME), IN_NAMES) for run in runs)
    cells["run"] = [name + state for name, state in zip(names, states, strict=True)]
    table = table_of()
    for title in cells:
        is_left = title not in LISTED
        table.add_column(title, justify="left" if is_left else "right", overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    terminal.show(table)
    for run in runs:
        if run.problem is not None:
            terminal.note(f"{run.name}: {run.problem}")


def _show_both(found: Comparison, terminal: Terminal) -> None:
    """The options that differ, then the figures, a column a run."""
    table = table_of()
    table.add_column("", no_wrap=True)
    titles = max(map(cell_len, (*found.options, *FIGURES)))
    room = (terminal.width - titles - 3 * len(found.runs)) // len(found.runs) - 1
    room = max(room, LEAST_NAME)
    for run in found.runs:
        name = in_lines(run.name, room, IN_NAMES)
        table.add_column(name, justify="right", overflow="fold")
    for name, values in found.options.items():
        said = (", ".join(map(str, one)) if isinstance(one, list) else str(one) for one in values)
        lines = ("" if text == "None" else in_lines(text, room, IN_VALUES) for text in said)
        table.add_row(name, *lines)
    if found.options:
        table.add_section()
    for title, shown in FIGURES.items():
        table.add_row(title, *(shown(run) for run in found.runs))
    terminal.show(table)
    if not found.options:
        terminal.print("no option differs")


def in_lines(text: str, width: int, ends: str) -> str:
    """A text in lines of `width` characters, broken after any of `ends`.

    A part that is longer than a line stays whole.
    """
    lines = [""]
    for part in re.findall(f"[^{ends}]*[{ends}]+|[^{ends}]+", text):
        if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _width(cells: Mapping[str, Sequence[str]]) -> int:
    """Characters of a table of these columns: each has a space beside it, and a line between."""
    width = 0
    for title, column in cells.items():
        lines = (line for cell in column for line in cell.split("\n"))
        width += max(map(cell_len, (title, *lines))) + 3
    return width - 1


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
    """Before and after, of the rows held out; else that of the rows of its last step."""
    if run.loss_after is None:
        return "" if run.last_loss is None else f"trained {run.last_loss:.2f}"
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

"""`qlora-kit show-data`: show which tokens of a data set are trained on.

It is printed, and written as one HTML page without a script: what the terminal shows, recorded by
rich, in colour, and the chat template behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ShowConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.files.atomic import write_file
from qlora_kit.options.parsed import refuse_tokens
from qlora_kit.process.streams import plain

if TYPE_CHECKING:
    from qlora_kit.data.report import Part, Report, ShownRow

SUMMARY = "Show which tokens are trained on, what is skipped or cut, and how much is padding."
BAR = 40
SHOWN = 5
"""Skipped and truncated rows that are listed."""
NOTE = " " * 10
"""In front of a note."""

STYLES = {
    (True, False): "white on dark_green",
    (True, True): "bold black on bright_green",
    (False, False): "",
    (False, True): "bold magenta",
}
"""By (trained, special)."""

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained on, where there is no colour."""
HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="qlora-kit show-data">'
)
"""How a page of ours begins, by which it is known to be one."""
PAGE = (
    HEAD + '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<title>qlora-kit show-data</title><style>{stylesheet}\n"
    "body {{ color: {foreground}; background: {background}; margin: 2rem auto; max-width: 60rem;\n"
    "  padding: 0 1.25rem; }}\n"
    "pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 monospace; }}"
    "</style></head><body>\n<pre>{code}</pre></body></html>\n"
)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = parse("qlora-kit show-data", SUMMARY, (BaseConfig, DataConfig, ShowConfig), argv)
    refuse_tokens(parsed)
    from qlora_kit.run.show_data import data_report, page_path

    page = page_path(parsed, HEAD)
    report = data_report(parsed)
    if page is not None:
        page_path(parsed, HEAD)  # what came there meanwhile is not lost
        write_file(page, _page_of(report).encode())
    terminal = Terminal()
    if parsed[ShowConfig].json:
        terminal.json(report.as_json())
    else:
        _print_report(report, terminal)
        if page is not None:
            terminal.print(f"page: {page}")
    if report.refusal is not None:
        # Shown all the same: this is what a run would say.
        raise report.refusal
    return 0


def _page_of(report: Report) -> str:
    """The whole page."""
    terminal = Terminal(record=True)
    terminal.print((f"{report.train.source} for {report.model}\n", "bold"))
    _print_report(report, terminal)
    if report.chat_template is not None:
        terminal.print(("\nchat template", "bold"))
        terminal.print(report.chat_template)
    return terminal.console.export_html(code_format=PAGE)


def _print_report(report: Report, terminal: Terminal) -> None:
    """Rows first, then counts, lengths and padding, so that the summary is what stays on screen."""
    coloured = terminal.has_colour
    for row in report.rows:
        _print_row(terminal, row, coloured)
    legend = Text().append("trained on", STYLES[True, False])
    legend.append("its end", STYLES[True, True])
    legend.append("  not trained on  ").append("control tokens", STYLES[False, True])
    terminal.show(legend if coloured else Text(f"{OPEN}trained on{CLOSE}  not trained on"))
    terminal.print()
    terminal.line(
        "data", f"{report.train.source} ({report.format}), max_length {report.max_length}"
    )
    if report.chats is not None:
        terminal.line("chats", report.chats)
    _print_part(terminal, report.train)
    if report.held_out is None:
        terminal.line("held out", report.held_out_source)
    else:
        terminal.line("held out", report.held_out.source)
        _print_part(terminal, report.held_out)
        if report.shared:
            are = "is" if report.shared == 1 else "are"
            said = f"{_count(report.shared, 'held-out row')} {are} also trained on"
            terminal.note(said, NOTE)
    packed = ""
    if "packed" in report.padding:
        share = report.padding["packed"]
        packed = f", {share:.1%} with --packing ({_count(report.packs, 'pack')})"
    terminal.line(
        "padding",
        f"batches of {report.batch_size}: {report.padding['random']:.1%} in random order, "
        f"{report.padding['by length']:.1%} with --group_by_length{packed}",
    )
    if report.padding_note:
        terminal.note(report.padding_note, NOTE)
    _print_lengths(terminal, report)


def _print_row(terminal: Terminal, row: ShownRow, coloured: bool) -> None:
    title = row.where
    if row.side:
        title += f" ({row.side})"
    elif row.parts > 1:
        title += f" (part {row.part} of {row.parts})"
    terminal.print((f"── {title} ──", "bold"))
    if row.skipped is not None:
        terminal.print((f"skipped: {row.skipped}", "red"))
    else:
        cut = ", truncated" if row.truncated and (row.parts == 1 or row.side) else ""
        control = f", {row.control_tokens} control tokens" if row.control_tokens else ""
        counts = f"{row.tokens} tokens, {row.trained_tokens} trained on{cut}{control}"
        terminal.print((counts, "dim"))
    text = Text()
    for piece in row.pieces:
        content = plain(piece.text)
        shown = content.replace("\n", "⏎\n") if piece.trained else content
        if coloured:
            text.append(shown, STYLES[piece.trained, piece.special])
        else:
            text.append(f"{OPEN}{content}{CLOSE}" if piece.trained else content)
    if not coloured:
        text = Text(text.plain.replace(CLOSE + OPEN, ""))
    terminal.show(text)


def _count(number: int, what: str) -> str:
    """So many, in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _print_part(terminal: Terminal, part: Part) -> None:
    count = _count(part.pairs, "pair") if part.pairs else _count(part.rows, "row")
    terminal.line(
        "",
        f"{count}, {part.tokens:,} tokens, {part.supervised_tokens:,} trained on "
        f"({part.supervised_share:.1%})",
    )
    for note in part.notes:
        terminal.note(note, NOTE)
    _list(terminal, [f"{where}: {reason}" for where, reason in part.skipped_rows])
    lost = [
        f"{where}: {f'{cut} tokens lost' if cut else 'cut into several rows'}"
        for where, cut in part.truncated_rows
    ]
    _list(terminal, lost)


def _print_lengths(terminal: Terminal, report: Report) -> None:
    if not report.bins:
        return
    terminal.line("lengths", "tokens of a row, and how many rows have them")
    most = max(count for _, _, count in report.bins)
    width = len(str(report.bins[-1][1]))
    for first, last, count in report.bins:
        eighths = round(8 * BAR * count / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        terminal.print(f"  {first:>{width}}-{last:<{width}} ", (bar, "green"), f" {count:,}")


def _list(terminal: Terminal, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        terminal.print((f"            {line}", "dim"))
    if len(lines) > SHOWN:
        terminal.print(("            ...", "dim"))

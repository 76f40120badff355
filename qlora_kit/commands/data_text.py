"""The report of `show-data` on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qlora_kit.commands.data_report import Part, Report, ShownRow
from qlora_kit.errors import redacted

BAR = 40
SHOWN = 5
"""Skipped and truncated rows that are listed."""

STYLES = {
    (True, False): "white on dark_green",
    (True, True): "bold black on bright_green",
    (False, False): "",
    (False, True): "bold magenta",
}
"""By (trained, special)."""

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained on, where there is no colour."""


def print_report(report: Report) -> None:
    """Rows first, then counts, lengths and padding, so that the summary is what stays on screen."""
    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    for row in report.rows:
        _print_row(console, row, coloured)
    legend = Text().append("trained on", STYLES[True, False])
    legend.append("its end", STYLES[True, True])
    legend.append("  not trained on  ").append("control tokens", STYLES[False, True])
    console.print(legend if coloured else f"{OPEN}trained on{CLOSE}  not trained on")
    console.print()
    _line(
        console, "data", f"{report.train.source} ({report.format}), max_length {report.max_length}"
    )
    _print_part(console, report.train)
    if report.held_out is None:
        _line(console, "held out", report.held_out_source)
    else:
        _line(console, "held out", report.held_out.source)
        _print_part(console, report.held_out)
        if report.shared:
            _note(console, f"{report.shared} held-out rows are also trained on")
    _line(
        console,
        "padding",
        f"batches of {report.batch_size}: {report.padding['random']:.1%} in random order, "
        f"{report.padding['by length']:.1%} with --group_by_length, "
        f"{report.padding['packed']:.1%} with --packing ({report.packs:,} packs)",
    )
    if report.padding_note:
        _note(console, report.padding_note)
    _print_lengths(console, report)


def _print_row(console: Console, row: ShownRow, coloured: bool) -> None:
    title = row.where
    if row.parts > 1:
        title += f" (part {row.part} of {row.parts})"
    console.print(f"[bold]── {escape(title)} ──[/]")
    if row.skipped is not None:
        console.print(f"[red]skipped: {escape(row.skipped)}[/]")
    else:
        cut = ", truncated" if row.truncated and row.parts == 1 else ""
        console.print(f"{row.tokens} tokens, {row.trained_tokens} trained on{cut}", style="dim")
    text = Text()
    for piece in row.pieces:
        shown = piece.text.replace("\n", "⏎\n") if piece.trained else piece.text
        if coloured:
            text.append(shown, STYLES[piece.trained, piece.special])
        else:
            text.append(f"{OPEN}{piece.text}{CLOSE}" if piece.trained else piece.text)
    if not coloured:
        text = Text(text.plain.replace(CLOSE + OPEN, ""))
    console.print(text)


def _print_part(console: Console, part: Part) -> None:
    _line(
        console,
        "",
        f"{part.rows:,} rows, {part.tokens:,} tokens, {part.supervised_tokens:,} trained on "
        f"({part.supervised_share:.1%})",
    )
    for reason, count in part.skipped.items():
        _note(console, f"{count} rows skipped: {reason}")
    _list(console, [f"{where}: {reason}" for where, reason in part.skipped_rows])
    if part.truncated:
        _note(console, f"{part.truncated} rows truncated, {part.cut_tokens:,} tokens lost")
        lost = [
            f"{where}: {f'{cut} tokens lost' if cut else 'cut into several rows'}"
            for where, cut in part.truncated_rows
        ]
        _list(console, lost)
    if part.duplicates:
        _note(console, f"{part.duplicates} rows are the same as an earlier one")


def _print_lengths(console: Console, report: Report) -> None:
    _line(console, "lengths", "tokens of a row, and how many rows have them")
    most = max(count for _, _, count in report.bins)
    width = len(str(report.bins[-1][1]))
    for first, last, count in report.bins:
        eighths = round(8 * BAR * count / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        console.print(f"  {first:>{width}}-{last:<{width}} [green]{bar}[/] {count:,}")


def _list(console: Console, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        console.print(f"            {escape(line)}", style="dim")
    if len(lines) > SHOWN:
        console.print("            ...", style="dim")


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{label:<9}[/] {escape(redacted(text))}")


def _note(console: Console, text: str) -> None:
    console.print(f"{'':<9} [yellow]note:[/] {escape(text)}")

"""The report of `show-data` as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.commands.data_report import Part, Report, ShownRow

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0;
  --paper: #fff; --box: #f7f7f9; --trained: #c4e8d1; --end: #30a46c; --control: #8e4ec6;
  --bar: #30a46c; --bad: #ce2c31; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --line: #43484e;
  --paper: #111113; --box: #1b1c1e; --trained: #1f4b33; --end: #33b074; --control: #d19dff;
  --bar: #33b074; --bad: #ff9592; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); } .bad { color: var(--bad); }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem 1.25rem .3rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
.row { border: 1px solid var(--line); border-radius: 8px; margin: .75rem 0; overflow: hidden; }
.row header { background: var(--box); border-bottom: 1px solid var(--line); padding: .4rem .9rem;
  display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; font-size: .9rem; }
pre { margin: 0; padding: .8rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.7 ui-monospace, monospace; }
.t { background: var(--trained); border-radius: 3px; padding: .1em 0; }
.c { color: var(--control); font-weight: 600; }
.t.c { background: var(--end); color: #fff; padding: .1em .25em; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px .75rem;
  align-items: center; font-size: .85rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .9rem; background: var(--bar); border-radius: 0 3px 3px 0;
  } .bars span { text-align: right; }
"""


HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="qlora-kit show-data">'
)
"""How a page of ours begins, by which it is known to be one."""


def page_of(report: Report) -> str:
    """The whole page."""
    title = f"{report.train.source} for {report.model}"
    return (
        f'{HEAD}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<p class="soft">rows of {report.format}, at most {report.max_length:,} tokens each</p>\n'
        f"{_counts(report)}{_left_out(report)}{_padding(report)}{_lengths(report)}{_rows(report)}"
        f"{_template(report)}</body></html>\n"
    )


def _counts(report: Report) -> str:
    parts = [("trained on", report.train)]
    if report.held_out is not None:
        parts.append((f"held out ({report.held_out.source})", report.held_out))
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{part.rows:,}</td><td>{part.tokens:,}</td>"
        f"<td>{part.supervised_tokens:,}</td><td>{part.supervised_share:.1%}</td>"
        f"<td>{sum(part.skipped.values()):,}</td><td>{part.truncated:,}</td>"
        f"<td>{part.duplicates:,}</td></tr>"
        for name, part in parts
    )
    shared = ""
    if report.held_out is None:
        shared = f'<p class="soft">held out: {escape(report.held_out_source)}</p>'
    elif report.shared:
        shared = f'<p class="bad">{report.shared} held-out rows are also trained on</p>'
    return (
        "<h2>Counts</h2><table><tr><th></th><th>rows</th><th>tokens</th><th>supervised</th>"
        f"<th>share</th><th>skipped</th><th>truncated</th><th>duplicates</th></tr>{rows}</table>"
        f"{shared}\n"
    )


def _left_out(report: Report) -> str:
    parts: list[Part] = [report.train, *([report.held_out] if report.held_out else [])]
    reasons = "".join(
        f"<tr><td>{escape(reason)}</td><td>{count:,}</td><td>{escape(part.source)}</td></tr>"
        for part in parts
        for reason, count in part.skipped.items()
    )
    lines = [f"{where}: skipped, {reason}" for part in parts for where, reason in part.skipped_rows]
    lines += [
        f"{where}: {f'truncated, {cut} tokens lost' if cut else 'cut into several rows'}"
        for part in parts
        for where, cut in part.truncated_rows
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for part in parts for note in part.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    if not lines:
        return f"<h2>Notes</h2>{notes}\n" if notes else ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    table = (
        f"<table><tr><th>reason</th><th>rows</th><th>of</th></tr>{reasons}</table>"
        if reasons
        else ""
    )
    return (
        f"<h2>Notes</h2>{notes}<h2>Skipped and truncated</h2>{table}"
        f"<details><summary>the first {len(lines)} of them</summary><ul>{listed}</ul></details>\n"
    )


def _padding(report: Report) -> str:
    names = {"random": "random order", "by length": "--group_by_length", "packed": "--packing"}
    rows = "".join(
        f"<tr><td>{names[name]}</td><td>{share:.1%}</td></tr>"
        for name, share in report.padding.items()
    )
    return (
        f"<h2>Padding in batches of {report.batch_size}</h2>"
        f"<table><tr><th></th><th>share</th></tr>{rows}</table>"
        f'<p class="soft">{escape(report.padding_note or "")}</p>\n'
    )


def _lengths(report: Report) -> str:
    most = max((count for _, _, count in report.bins), default=0)
    bars = "".join(
        f'<span>{first:,}-{last:,}</span><i style="width:{100 * count / most:.2f}%;'
        f'min-width:{min(count, 1)}px"></i>'
        f"<span>{count:,}</span>"
        for first, last, count in report.bins
    )
    return f'<h2>Tokens of a row</h2><div class="bars">{bars}</div>\n'


def _rows(report: Report) -> str:
    if not report.rows:
        return ""
    legend = (
        '<p class="soft"><span class="t">trained on</span> <span class="t c">its end</span> '
        '<span>not trained on</span> <span class="c">control token</span></p>'
    )
    return f"<h2>Rows</h2>{legend}{''.join(map(_row, report.rows))}\n"


def _row(row: ShownRow) -> str:
    part = f" (part {row.part} of {row.parts})" if row.parts > 1 else ""
    what = f"{row.tokens} tokens, {row.trained_tokens} trained on"
    if row.skipped is not None:
        what = f'<span class="bad">skipped: {escape(row.skipped)}</span>'
    elif row.truncated and row.parts == 1:
        what += ', <span class="bad">truncated</span>'
    pieces = "".join(
        f'<span class="{("t" if piece.trained else "") + (" c" if piece.special else "")}" '
        f'title="{piece.tokens} tokens">{escape(piece.text)}</span>'
        for piece in row.pieces
    )
    return (
        f'<section class="row"><header><b>{escape(row.where)}{part}</b><span>{what}</span></header>'
        f"<pre>{pieces}</pre></section>\n"
    )


def _template(report: Report) -> str:
    if report.chat_template is None:
        return ""
    return (
        "<h2>Chat template</h2><details><summary>show</summary>"
        f"<pre>{escape(report.chat_template)}</pre></details>\n"
    )

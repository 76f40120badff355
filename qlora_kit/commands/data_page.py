"""The report of `show-data` as one HTML page that needs nothing else: no script, no network.

It is what the terminal shows, recorded by rich, in colour, and the chat template behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.commands.data_text import print_report
from qlora_kit.commands.terminal import Terminal

if TYPE_CHECKING:
    from qlora_kit.data.report import Report

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


def page_of(report: Report) -> str:
    """The whole page."""
    terminal = Terminal(record=True)
    terminal.print((f"{report.train.source} for {report.model}\n", "bold"))
    print_report(report, terminal)
    if report.chat_template is not None:
        terminal.print(("\nchat template", "bold"))
        terminal.print(report.chat_template)
    return terminal.console.export_html(code_format=PAGE)

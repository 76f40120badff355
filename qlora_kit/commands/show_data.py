"""`qlora-kit show-data`: show which tokens of a data set are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.data_text import HEAD, page_of, print_report
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ShowConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.files.atomic import write_file
from qlora_kit.options.parsed import refuse_tokens

SUMMARY = "Show which tokens are trained on, what is skipped or cut, and how much is padding."


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
        write_file(page, page_of(report).encode())
    terminal = Terminal()
    if parsed[ShowConfig].json:
        terminal.json(report.as_json())
    else:
        print_report(report, terminal)
        if page is not None:
            terminal.print(f"page: {page}")
    if report.refusal is not None:
        # Shown all the same: this is what a run would say.
        raise report.refusal
    return 0

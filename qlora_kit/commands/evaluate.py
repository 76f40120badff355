"""`qlora-kit evaluate`: loss, perplexity and exact match of a base, its adapters or an export."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.progress import working
from qlora_kit.commands.terminal import Terminal, table_of
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import BASE, AdaptersConfig, EvaluateConfig

SUMMARY = "Evaluate a base, its adapters or an export on a file: loss, perplexity, exact match."
GROUPS = (BaseConfig, AdaptersConfig, DataConfig, EvaluateConfig)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = parse("qlora-kit evaluate", SUMMARY, GROUPS, argv)
    from qlora_kit.run.evaluate import evaluate_model

    terminal = Terminal()
    with working(terminal, "evaluating"):
        reports = evaluate_model(parsed)
    if parsed[EvaluateConfig].json:
        terminal.json(reports if len(reports) > 1 else reports[0], indent=2)
    elif len(reports) > 1:
        _compare(reports, terminal)
    else:
        _show(reports[0], terminal)
    return 0


def _compare(reports: list[dict[str, Any]], terminal: Terminal) -> None:
    """The base and its adapters side by side: their answers, then a table."""
    names = [report["adapter"] or BASE for report in reports]
    width = max(map(len, ("  expected", *names)))
    _show_answers(reports, names, terminal, width + 2)
    base = reports[0]
    terminal.line("model", f"{base['model']}, {base['bits']} bits, {base['dtype']}", width=10)
    terminal.line("data", _counts(base), width=10)
    table = table_of("adapter", "loss", "perplexity", "exact match", left=["adapter"])
    for name, report in zip(names, reports, strict=True):
        exact = ""
        if report["asked"]:
            exact = f"{report['right']} of {report['asked']} ({report['exact_match']:.1%})"
        table.add_row(name, f"{report['loss']:.4f}", _perplexity(report), exact)
    terminal.show(table)


def _show_answers(
    reports: list[dict[str, Any]], names: list[str], terminal: Terminal, width: int
) -> None:
    """What each row asks and expects, and the answer in each of the reports."""
    for answers in zip(*(report["answers"] for report in reports), strict=True):
        terminal.print((answers[0]["prompt"].strip(), "dim"))
        terminal.line("  expected", answers[0]["expected"], width=width)
        for name, answer in zip(names, answers, strict=True):
            verdict = "right" if answer["right"] else "wrong"
            terminal.line(f"  {name}", f"{answer['answer']}  ({verdict})", width=width)


def _counts(report: dict[str, Any]) -> str:
    lost = "".join(f", {report[how]:,} {how}" for how in ("skipped", "truncated") if report[how])
    rows = f"{report['rows']:,} row{'' if report['rows'] == 1 else 's'}"
    return f"{report['data']}: {rows}{lost}, {report['tokens']:,} tokens"


def _perplexity(report: dict[str, Any]) -> str:
    perplexity = report["perplexity"]
    return "beyond measure" if perplexity is None else f"{perplexity:,.3f}"


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    line = functools.partial(terminal.line, width=10)
    _show_answers([report], ["answer"], terminal, 10)
    line("model", f"{report['model']}, {report['bits']} bits, {report['dtype']}")
    if report["adapter"] is not None:
        line("adapter", report["adapter"])
    line("data", _counts(report))
    line("loss", f"{report['loss']:.4f} nats a token, perplexity {_perplexity(report)}")
    if report["asked"]:
        right = f"{report['right']} of {report['asked']} answers equal the completion"
        line("exact", f"{right} ({report['exact_match']:.1%})")

"""`qlora-kit evaluate`: loss, perplexity and exact match of a base, an adapter or an export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import AdaptersConfig, EvaluateConfig

SUMMARY = "Evaluate a base, an adapter or an export on a file: loss, perplexity, exact match."
GROUPS = (BaseConfig, AdaptersConfig, DataConfig, EvaluateConfig)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit evaluate", SUMMARY, GROUPS, given)
    from qlora_kit.run.evaluate import evaluate_model

    report, terminal = evaluate_model(parsed), Terminal()
    if parsed[EvaluateConfig].json:
        terminal.json(report, indent=2)
    else:
        _show(report, terminal)
    return 0


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    lines = [("model", f"{report['model']}, {report['bits']} bits, {report['dtype']}")]
    for answer in report["answers"]:
        terminal.print((answer["prompt"].strip(), "dim"))
        terminal.line("  expected", answer["expected"], width=10)
        verdict = "right" if answer["right"] else "wrong"
        terminal.line("  answer", f"{answer['answer']}  ({verdict})", width=10)
    if report["adapter"] is not None:
        lines.append(("adapter", report["adapter"]))
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    counts = f"{report['rows']:,} rows{skipped}, {report['tokens']:,} tokens"
    lines.append(("data", f"{report['data']}: {counts}"))
    perplexity = report["perplexity"]
    shown = "beyond measure" if perplexity is None else f"{perplexity:,.3f}"
    lines.append(("loss", f"{report['loss']:.4f} nats a token, perplexity {shown}"))
    if report["asked"]:
        right = f"{report['right']} of {report['asked']} answers equal the completion"
        lines.append(("exact", f"{right} ({report['exact_match']:.1%})"))
    for label, text in lines:
        terminal.line(label, text, width=10)

"""`qlora-kit export`: a trained model in a format for others, and how far it is from training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal, size
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.output import HubConfig
from qlora_kit.options.parsed import Parsed, refuse_tokens

if TYPE_CHECKING:
    from qlora_kit.run.export import Exported

SUMMARY = "Write what was trained in a format that others load, verified against training."
FAR_KL = 1e-2
"""Nats a token above which an export is said to be another model: merging exactly and rounding to
bf16 gives 1e-3, and merging into the original base of 4 bits 1e-1."""
MADE_UP = " (it makes the tokenizer of a GGUF up by the family)"
LABEL = 25
"""Characters of a form in the table of `--compare`."""


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    # The export's own --dtype comes first: it is the dtype of what is written.
    parsed = parse("qlora-kit export", SUMMARY, (ExportConfig, BaseConfig, HubConfig), argv)
    refuse_tokens(parsed)
    return run_export(parsed)


def run_export(parsed: Parsed) -> int:
    """Write what the options say, and show it; returns the exit code. Errors: as `export`."""
    from qlora_kit.run.export import export

    terminal = Terminal()
    exported = export(parsed, terminal.note, _Compared(terminal))
    if exported.place is None:
        return 0
    _show(exported, exported.place, terminal)
    if address := exported.send():
        terminal.line("sent", address, width=10)
    return 0


def _show(exported: Exported, place: str, terminal: Terminal) -> None:
    """Print where an export is, and how far it is from what was trained."""
    terminal.line("exported", place, width=10)
    report = exported.report
    for note in (*exported.notes, *(report or {}).get("notes", ())):
        terminal.note(note)
    if exported.serve is not None:
        terminal.line("serve", exported.serve, width=10)
    if report is None:
        return
    if (updates := report.get("updates")) is not None:
        error = report["update_error"]
        said = f"within {error:.0e} of" if error else "equal to"
        terminal.line(
            "verified", f"{updates} updates, read back, are {said} the trained ones", width=10
        )
    for name, read in report["readers"].items():
        _show_read(terminal, name, read, report["verified_on"])
    for name, why in report.get("not_read_by", {}).items():
        terminal.note(f"the export was not read by {name}: {why}")
    if (report["kl"] or 0) > FAR_KL:
        warnings.warn(
            f"the export is another model than the one that was trained: {report['kl']:.2g} nats a "
            f"token from it, and for {1 - report['top1_agreement']:.0%} of the tokens another one "
            f"is the likeliest; {exported.closer}, or look at its answers before it is used "
            "(--max_kl makes this an error)",
            stacklevel=1,
        )


def _show_read(terminal: Terminal, name: str, read: Mapping[str, Any], where: str) -> None:
    """A line on what a reader of the export found."""
    if "kl" not in read:
        said = f"{read['tensors']} tensors are what was written, no text was read"
        terminal.line("checked", f"by {name}, {read['read']}: {said}", width=10)
        return
    how = "" if read["read"].startswith("whole") else f", {read['read']},"
    texts = "all" if read["texts_equal"] == read["texts"] else f"{read['texts_equal']} of"
    made_up = name == "transformers" and texts != "all"
    terminal.line(
        "compared" if read["kl"] > FAR_KL else "verified",
        f"by {name}{how} on {read['tokens']} tokens of {where}: "
        f"KL {read['kl']:.2e}, top-1 agreement {read['top1_agreement']:.1%}, "
        f"largest logit difference {read['max_logit_difference']:.3g}, "
        f"tokenizer equal on {texts} {read['texts']} texts{MADE_UP if made_up else ''}",
        width=10,
    )
    if note := read.get("note"):
        terminal.note(note)


class _Compared:
    """The table of `--compare`: a line for each form, as it is known."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._begun = terminal, False

    def __call__(self, form: Mapping[str, Any]) -> None:
        if not self._begun:
            head = f"{'size':>10}  {'KL':>8}  {'top-1':>6}  {'furthest logit':>14}  read by"
            self._terminal.print(f"  {'':<{LABEL}}", (head, "bold"))
            self._begun = True
        kind = form.get("quantize") or form.get("dtype")
        names = (form["format"], kind, form.get("merge_base"))
        label = f"  {' '.join(name for name in names if name):<{LABEL}}"
        if "not_available" in form:
            said = f"not available: {form['not_available']}"
        elif form["kl"] is None:
            said = f"{size(form['bytes']):>10}  nothing here reads it"
        else:
            said = (
                f"{size(form['bytes']):>10}  {form['kl']:>8.2e}  {form['top1_agreement']:>6.1%}  "
                f"{form['max_logit_difference']:>14.3g}  {form['reader']}"
            )
        self._terminal.print(label, said)

"""`qlora-kit finetune`: load a base in 4, 8 or 16 bits, train LoRA adapters, save them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from qlora_kit.commands.argv import parse
from qlora_kit.commands.display import Display
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.run import FINETUNE_GROUPS, QUICKSTART
from qlora_kit.options.parsed import Parsed
from qlora_kit.process.signals import StopSignals

if TYPE_CHECKING:
    from qlora_kit.data.lines import GivenRows
    from qlora_kit.run.prepare import FinishedRun
    from qlora_kit.run.reporter import Reporter
    from qlora_kit.run.run import Run

SUMMARY = "Load a base in 4, 8 or 16 bits, train LoRA adapters on it, save them."


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = _parse(argv)

    def display() -> Display:
        shown = Display()
        if parsed.config_file == str(QUICKSTART):
            shown.text_file(QUICKSTART, "no --model, --data or --config: running the quickstart")
        return shown

    with StopSignals() as signals, opened_run(parsed, display, signals) as run:
        if not run.is_finished:
            run.train(**run.training())
            run.finish()
    return 0


def opened_run(
    parsed: Parsed,
    reporter: Callable[[], Reporter],
    signals: StopSignals,
    given: Mapping[str, GivenRows] | None = None,
) -> AbstractContextManager[Run | FinishedRun]:
    """The run that options ask for, ready for `train`; or the one to resume, which is finished.

    `reporter` makes who is told of it, once the request is read; `given` has rows of the program.
    Errors: those of `read_request`, `prepare_run` and `open_run`.
    """
    from qlora_kit.run.request import read_request

    request = read_request(parsed, given)  # without torch, which takes longer to import than this
    from qlora_kit.run.opening import open_run

    return open_run(request, reporter(), signals)


def _parse(argv: Sequence[str]) -> Parsed:
    parsed = parse("qlora-kit finetune", SUMMARY, FINETUNE_GROUPS, argv)
    given = {name for group in FINETUNE_GROUPS for name in parsed.given[group]}
    if parsed.config_file is None and not given & {"model", "data", "adapter"}:
        parsed = parse(
            "qlora-kit finetune", SUMMARY, FINETUNE_GROUPS, ["--config", str(QUICKSTART), *argv]
        )
    return parsed

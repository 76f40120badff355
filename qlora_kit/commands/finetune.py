"""`qlora-kit finetune`: load a base in 4, 8 or 16 bits, train LoRA adapters, save them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.run import RUN_GROUPS
from qlora_kit.options.parsed import Parsed
from qlora_kit.process.signals import StopSignals

SUMMARY = "Load a base in 4, 8 or 16 bits, train LoRA adapters on it, save them."
QUICKSTART = Path(__file__).resolve().parent.parent / "assets" / "quickstart.yaml"


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parsed = _parse(sys.argv[1:] if argv is None else argv)
    from qlora_kit.run.request import read_request

    request = read_request(parsed)  # without torch, which takes longer to import than this
    from qlora_kit.commands.display import Display
    from qlora_kit.run.opening import open_run
    from qlora_kit.run.prepare import PreparedRun, prepare_run
    from qlora_kit.training.loop import train

    display = Display()
    if parsed.config_file == str(QUICKSTART):
        display.text_file(QUICKSTART, "no --model, --data or --config: running the quickstart")
    with StopSignals() as signals:
        prepared = prepare_run(request, display)
        if isinstance(prepared, PreparedRun):
            with open_run(prepared, display, signals) as run:
                train(**run.training())
                run.finish()
    return 0


def _parse(argv: Sequence[str]) -> Parsed:
    parsed = parse("qlora-kit finetune", SUMMARY, RUN_GROUPS, argv)
    given = {name for group in RUN_GROUPS for name in parsed.given[group]}
    if parsed.config_file is None and not given & {"model", "data", "adapter"}:
        parsed = parse(
            "qlora-kit finetune", SUMMARY, RUN_GROUPS, ["--config", str(QUICKSTART), *argv]
        )
    return parsed

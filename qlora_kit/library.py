"""`finetune` of Python: the run of the command, with all that it checks, writes and keeps."""

from __future__ import annotations

import warnings
from typing import Any

from qlora_kit.commands.display import Display
from qlora_kit.commands.failure import stands_for
from qlora_kit.commands.finetune import opened_run
from qlora_kit.config.run import FINETUNE_GROUPS
from qlora_kit.data.lines import GivenRows, given_rows
from qlora_kit.live.chart import TrainingChart, in_notebook
from qlora_kit.options.parsed import parse_values
from qlora_kit.process.signals import StopSignals
from qlora_kit.process.start import ready_for_torch
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.runs import RunResult

TRAINED = {"data", "dataset"}
"""Both names of one option."""
ROWS = (*sorted(TRAINED), "eval_data")
"""The options whose value may also be rows."""


def finetune(*, progress: bool | Reporter = False, **options: Any) -> RunResult:
    """Train LoRA adapters on a base, as `qlora-kit finetune` does; `options` are its options.

    Their names, checks and defaults are those of a config file. `data` and `eval_data` may also be
    a list of dicts or a `datasets.Dataset`, whose rows are checked like those of a file; a run on
    such rows is resumed with the same rows. Nothing is printed, unless `progress` shows what the
    command shows, in a notebook as one chart that moves; or it is a reporter of your own, which is
    told of the run as it goes. ^C and the signals that stop the command save where
    the run stands and raise `KeyboardInterrupt`; handlers are as they were when this returns.

    Errors: `QloraKitError`, of the kinds that give the command its exit codes.
    """

    def reporter() -> Reporter:
        if isinstance(progress, Reporter):
            return progress
        if progress and in_notebook():
            return TrainingChart()
        return Display() if progress else Reporter()

    with StopSignals() as signals, ready_for_torch():
        try:
            if all(options.get(name) is None for name in TRAINED) and TRAINED & options.keys():
                # None leaves an option alone. A variable that was never filled is None as well.
                warnings.warn("data is None: trained on is the package's sample", stacklevel=2)
            given: dict[str, GivenRows] = {}
            for name in ROWS:
                rows = given_rows(name, options.get(name))
                if rows is not None:
                    given[rows.name], options[name] = rows, rows.name
            parsed = parse_values(options, FINETUNE_GROUPS)
            with opened_run(parsed, reporter, signals, given) as run:
                if not run.is_finished:
                    run.train(**run.training())
                    run.finish()
            return RunResult.read(run.directory)
        except Exception as error:
            failure = stands_for(error, "finetune")
            if failure is error:
                raise
            raise failure from error

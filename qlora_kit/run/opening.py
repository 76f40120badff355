"""Around a run: its directory is held, its files are open, and what it reached is saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qlora_kit.device.found import memory_name
from qlora_kit.errors import QloraKitError
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.run.directory import RunDirectory, run_directory
from qlora_kit.run.metrics import MetricsLog, start_trackers
from qlora_kit.run.prepare import FinishedRun, PreparedRun, prepare_run
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.request import RunRequest
from qlora_kit.run.run import Run
from qlora_kit.run.sending import check_base_name, send_run

FAILURES = (QloraKitError, OSError, MemoryError, RuntimeError)
"""What a run ends with that is no bug: what is refused, and what a disk or a device says."""


@contextlib.contextmanager
def open_run(
    request: RunRequest, reporter: Reporter, signals: StopSignals
) -> Iterator[Run | FinishedRun]:
    """Prepare a run, hold its directory, load the model, restore the checkpoint; then hand over.

    A run to resume that is finished is handed over as that. When the block stops between two steps
    (a signal, a numeric error, a full device), what was reached is saved first; where it stops in
    the optimizer's part of a step, nothing is. At the end the adapter goes to the hub where that
    is asked for. Errors: those of preparing, loading and sending, `ResourceError`, `Stopped`.
    """
    plan = prepare_run(request, reporter)
    if isinstance(plan, FinishedRun):
        yield plan
        send_run(request.parsed, plan.directory, reporter)
        return
    check_base_name(request.parsed, plan.base.source.reference)
    output = plan.config.output
    with contextlib.ExitStack() as stack:
        plan, place = _hold_directory(plan, stack)
        # What another run of this process has left is no part of this one's memory.
        stack.enter_context(own_workspace({}))
        run = Run(plan, place, reporter, signals)
        resumed = None if plan.resume is None else run.state.progress.step
        config, note = plan.config.as_flat(), reporter.note
        trackers = start_trackers(output.report_to, place.path, config, note)
        with (
            MetricsLog(place.path, trackers=trackers, resume_step=resumed, note=note) as log,
            reporter.progress(plan.schedule.num_steps, memory_name(plan.base.device)) as bar,
            signals.between_steps(),
        ):
            try:
                run.begin(log.write, bar)
                yield run
            except Stopped as stopped:
                run.leave_step()
                raise run.stopped(stopped.signal_number) from None
            except FAILURES as error:
                run.leave_step()
                if (failure := run.full_in_optimizer(error)) is not None:
                    raise failure from error
                if not run.is_half:
                    with contextlib.suppress(*FAILURES):
                        run.state.save()
                raise
    send_run(request.parsed, run.directory, reporter)


def _hold_directory(
    plan: PreparedRun, stack: contextlib.ExitStack
) -> tuple[PreparedRun, RunDirectory]:
    """Hold the run's directory; of the default names the first that nobody else has by now."""
    overwrite = plan.config.output.overwrite
    if plan.names is None:
        return plan, stack.enter_context(run_directory(plan.directory, overwrite))
    for path in plan.names:
        with contextlib.suppress(FileExistsError):
            return plan.at(path), stack.enter_context(run_directory(path, overwrite, fresh=True))
    raise AssertionError("the names do not end")

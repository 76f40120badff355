"""How far a run is: a line that is drawn over on a terminal, else a line now and then.

Its parts are taken in the order of what a reader needs, as many as the terminal is wide: where the
run stands and what is left are there at any width.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qlora_kit.commands.terminal import Terminal, size
from qlora_kit.run.reporter import StepReporter

if TYPE_CHECKING:
    from qlora_kit.training.loop import StepReport
    from qlora_kit.training.loss import Evaluation

LINE_S, LONGEST_S, LINES = 2.0, 60.0, 100
"""Seconds between two lines where nothing can be drawn over: more in a long run, up to a minute."""
SPEED_STEPS = 50
"""Steps whose time says how long the others will take."""
MEASURES = {"margin": ".3f", "accuracy": ".0%"}
"""How what is measured of pairs is shown."""
BAR, BAR_WIDTH = 24, 110
"""Characters of the bar, and of a terminal that has room for one."""


class TrainingProgress(StepReporter):
    """The steps of a run, as they are done; `memory` says what its bytes are those of."""

    def __init__(
        self,
        terminal: Terminal,
        total_steps: int,
        memory: str,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._terminal, self._total, self._memory = terminal, total_steps, memory
        self._began_s = seconds()
        self._shown_s = -LONGEST_S
        self._ends = deque([self._began_s], SPEED_STEPS + 1)
        self._live = terminal.is_live
        self._width = terminal.console.width
        self._has_bar = self._width >= BAR_WIDTH
        columns = [TextColumn("{task.description}", markup=False)]
        bars = [BarColumn(BAR)] if self._has_bar else []
        self._bar = Progress(*bars, *columns, console=terminal.console, disable=not self._live)
        self._task = self._bar.add_task(f"training  0/{total_steps}", total=total_steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, before: Evaluation | None) -> None:
        """Say the loss before the first step, and count the time of steps from here on."""
        self._ends = deque([self._seconds()], SPEED_STEPS + 1)
        if before is not None:
            self._terminal.print(f"held-out loss before training: {loss_text(before)}")

    def step(self, report: StepReport, peak: int) -> None:
        """One step is done."""
        now = self._seconds()
        self._ends.append(now)
        left_s = (now - self._ends[0]) / (len(self._ends) - 1) * (self._total - report.step)
        parts = [
            f"step {report.step}/{self._total}",
            f"{clock(left_s)} left",
            f"loss {loss_text(report)}",
            f"{report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s",
            f"{self._memory} {size(peak)}",
            f"lr {report.learning_rate:.1e}",
        ]
        if report.loss_scale is not None:
            parts.append(f"loss scale {report.loss_scale:g}")
        if self._live:
            room = self._width - (BAR + 1 if self._has_bar else 0)
            while len(parts) > 2 and len("  ".join(parts)) >= room:
                parts.pop()
            text = "  ".join(parts)
            self._bar.update(self._task, completed=report.step, description=text)
            return
        due_s = min(LONGEST_S, max(LINE_S, (now - self._began_s) / LINES))
        if now - self._shown_s >= due_s or report.step == self._total:
            self._shown_s = now
            self._terminal.print("  ".join(parts))


@contextlib.contextmanager
def working(terminal: Terminal, what: str) -> Iterator[None]:
    """On a terminal `what` is done and for how long, in a line that goes when it is done.

    It is on standard output: on standard error control sequences are shown, not obeyed. Nothing
    else is printed meanwhile but warnings, and those stay out of it where they go to a file.
    """
    columns = TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    shown = Progress(
        *columns,
        console=terminal.console,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),
        disable=not terminal.is_live,
    )
    with shown:
        shown.add_task(what, total=None)
        yield


def loss_text(found: Evaluation | StepReport) -> str:
    """A loss, and what was measured beside it."""
    measured = (f"{name} {value:{MEASURES[name]}}" for name, value in found.measures.items())
    return "  ".join([f"{found.loss:.3f}", *measured])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, `1:02:03`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

"""A training run as a chart that moves: give it to `finetune(progress=...)`.

It is drawn in the output of a notebook's cell; where there is no notebook nothing is shown.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.pictures import png, training_figure
from qlora_kit.run.reporter import Reporter, StepReporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlora_kit.config.run import RunConfig
    from qlora_kit.data.rows import Row
    from qlora_kit.training.loop import StepReport
    from qlora_kit.training.loss import Evaluation

EVERY_S = 0.5
"""Seconds between two drawings, of which each takes a tenth."""
CELL = "<td style='text-align: left'>"


class Output:
    """A place in the output of a cell that holds one picture or table at a time."""

    def __init__(self) -> None:
        self._shown: Any = None

    def show(self, figure: Figure) -> None:
        """Draw a figure there, in place of what was there."""
        if in_notebook():
            from IPython.display import Image

            self._put(Image(data=png(figure), format="png"))  # type: ignore[no-untyped-call]

    def html(self, text: str) -> None:
        """Put HTML there, whose texts are escaped already."""
        if in_notebook():
            from IPython.display import HTML

            self._put(HTML(text))  # type: ignore[no-untyped-call]

    def _put(self, what: Any) -> None:
        from IPython.display import display

        if self._shown is None:
            self._shown = display(what, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(what)


def in_notebook() -> bool:
    """Whether a kernel runs this, whose front end shows pictures, and they can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()  # type: ignore[no-untyped-call]
    return shell is not None and hasattr(shell, "kernel")


class TrainingChart(Reporter):
    """Loss, tokens a second and memory of each step in one output that is drawn over.

    Below it the held-out prompts, answered before and after, and what should not be missed.
    `steps` has the numbers of each step, `held_out` step and loss of each evaluation.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self._chart, self._table, self._notes = Output(), Output(), Output()
        self._said: list[str] = []
        self._total, self._memory = 1, ""

    def note(self, text: str) -> None:
        """One line that the reader should not miss."""
        self._said.append(f"<p>note: {html.escape(text)}</p>")
        self._notes.html("".join(self._said))

    @contextlib.contextmanager
    def progress(self, total_steps: int, memory: str) -> Iterator[StepReporter]:
        """Around the steps of a run."""
        self._total, self._memory = total_steps, memory
        yield _Steps(self)
        self.draw()

    def evaluation(self, step: int, found: Evaluation) -> None:
        """The held-out loss in the middle of a run."""
        self.held_out.append((step, found.loss))

    def result(
        self,
        run: Mapping[str, Any],
        directory: Path,
        config: RunConfig,
        prompts: Sequence[str],
        is_chat: bool,
    ) -> None:
        """The last held-out loss is known."""
        if run["eval"]:
            self.held_out.append((run["train"]["steps"], run["eval"]["loss_after"]))
        self.draw()

    def answers(self, questions: Sequence[Row], answers: Sequence[Sequence[str]]) -> None:
        """Held-out prompts with the answers before and after training, as a table."""
        rows = [("prompt", "before", "after", "expected")]
        rows += [
            (row.content["prompt"], before, after, row.content["completion"])
            for row, before, after in zip(questions, *answers, strict=True)
        ]
        cells = ("".join(f"{CELL}{html.escape(cell.strip())}</td>" for cell in row) for row in rows)
        lines = "".join(f"<tr>{row}</tr>" for row in cells)
        self._table.html(f"<table>{lines}</table>" if questions else "")

    def draw(self) -> None:
        """Draw what is known."""
        if self.steps:
            figure = training_figure(self.steps, self.held_out, self._total, self._memory)
            self._chart.show(figure)


class _Steps(StepReporter):
    def __init__(self, chart: TrainingChart) -> None:
        self._chart, self._drawn_s = chart, time.monotonic()

    def start(self, before: Evaluation | None) -> None:
        """The loss before the first step, where something is held out."""
        if before is not None:
            self._chart.held_out.append((0, before.loss))

    def step(self, report: StepReport, peak: int) -> None:
        """A step is done; `peak` is in bytes."""
        self._chart.steps.append(
            {
                "step": report.step,
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "tokens_per_s": report.tokens / max(report.seconds, 1e-9),
                "peak_bytes": peak,
            }
        )
        if time.monotonic() - self._drawn_s > EVERY_S:
            self._chart.draw()
            self._drawn_s = time.monotonic()

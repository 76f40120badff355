"""Laws of how far a run is: on a terminal of any width, and where nothing can be drawn over."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from rich.console import Console

from qlora_kit.commands.progress import TrainingProgress, clock, working
from qlora_kit.commands.terminal import Terminal
from qlora_kit.training.loop import StepReport
from qlora_kit.training.loss import Evaluation


def terminal_of(width: int, live: bool) -> Terminal:
    terminal = Terminal()

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return live

    terminal.console = Console(file=Stream(), width=width, force_terminal=live, soft_wrap=True)
    return terminal


def written(terminal: Terminal) -> str:
    assert isinstance(terminal.console.file, io.StringIO)
    return terminal.console.file.getvalue()


def report(step: int, seconds: float = 0.5) -> StepReport:
    return StepReport(step, 12.345, 2e-4, 1.0, 123456, 100, seconds)


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_the_remaining_time_is_whole_at_any_width(width: int) -> None:
    now = itertools.count(step=40.0)
    terminal = terminal_of(width, live=True)
    with TrainingProgress(terminal, 12345, "process", lambda: next(now)) as bar:
        bar.step(report(1), 12345 * 1024**2)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(terminal))
    last = plain.replace("\r", "\n").strip().splitlines()[-1]
    assert "step 1/12345  137:09:20 left" in last  # 12,344 steps of 40 s
    if width >= 80:
        assert "loss 12.345  246,912 tokens/s  " in last
    if width >= 120:
        assert "process 12.06 GiB  lr 2.0e-04" in last


@pytest.mark.parametrize("width", [80, 200])
def test_in_a_pipe_a_line_comes_at_most_every_two_seconds(width: int) -> None:
    times = {"now": 0.0}
    terminal = terminal_of(width, live=False)
    with TrainingProgress(terminal, 10_000, "process", lambda: times["now"]) as bar:
        for step in range(1, 10_001):
            times["now"] += 0.1
            bar.step(report(step), 2**20)
    lines = written(terminal).splitlines()
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert steps[0] == 1  # at once: a reader sees that it works
    assert steps[-1] == 10_000
    assert all(b - a >= 20 for a, b in itertools.pairwise(steps[:-1]))
    assert steps[1] <= 22
    assert len(steps) < 1000 / 2
    assert lines[1].startswith("step 21/10000  0:16:38 left  loss 12.345  ")
    assert "\x1b" not in written(terminal)


def test_colours_that_are_asked_for_make_no_bar_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = Terminal()
    terminal.console.file = io.StringIO()
    assert terminal.console.is_terminal
    assert not terminal.is_live


def test_times_are_written_with_hours() -> None:
    assert [clock(s) for s in (0, 59.6, 3661, 360000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "100:00:00",
    ]


def test_what_came_before_the_first_step_is_no_part_of_the_time_that_is_left() -> None:
    times = {"now": 0.0}
    terminal = terminal_of(200, live=False)
    with TrainingProgress(terminal, 3, "process", lambda: times["now"]) as bar:
        times["now"] = 68.0  # the held-out rows are read
        bar.start(Evaluation(loss=7.1, tokens=10))
        times["now"] += 0.5
        bar.step(report(1), 2**20)
    assert "step 1/3  0:00:01 left" in written(terminal)


def test_what_takes_long_says_so_on_a_terminal_and_leaves_nothing() -> None:
    for live in (True, False):
        terminal = terminal_of(80, live)
        with working(terminal, "planning"):
            pass
        shown = written(terminal)
        assert shown.endswith("\x1b[2K") if live else not shown  # the line is cleared
        assert ("planning 0:00:00" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)) == live

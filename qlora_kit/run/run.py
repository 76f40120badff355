"""One training run around its steps: what is evaluated, saved, logged and shown between them.

`Run` has what `train` needs and what it calls: `run_backward` wraps the passes of a step,
`before_step` is asked before the optimizer's, `on_step` is called after it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.run.assembly import Assembled
from qlora_kit.run.directory import RunDirectory
from qlora_kit.run.evaluation import HeldOut
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.publish import write_result
from qlora_kit.run.replan import half_taken, try_largest
from qlora_kit.run.reporter import Reporter, StepReporter
from qlora_kit.run.result import result_record
from qlora_kit.run.saving import RunState
from qlora_kit.training.loop import Backward, MicroBatches, StepReport, train
from qlora_kit.training.preference import objective_of


class Run:
    """A model with adapters, its optimizer, and what happens between its steps.

    `train(**run.training())` trains it, then `finish` ends it.
    """

    is_finished: Literal[False] = False
    train = staticmethod(train)

    def __init__(
        self, plan: PreparedRun, place: RunDirectory, reporter: Reporter, signals: StopSignals
    ) -> None:
        self._plan, self._place, self._reporter, self._signals = plan, place, reporter, signals
        self._parts = Assembled(plan, reporter, signals)
        self._objective = objective_of(plan.config.training)
        model = self._parts.model
        self._held_out = HeldOut(plan, model, self._objective, reporter, signals)
        self.state = RunState(plan, place, self._parts, reporter)
        self.is_half = False
        """Whether the optimizer has begun to take a step, and not ended."""

    def begin(self, log: Callable[[Mapping[str, Any]], None], bar: StepReporter) -> None:
        """Measure what the run starts from, unless the checkpoint says it."""
        self._log, self._bar = log, bar
        self.state.begin()
        progress, parts = self.state.progress, self._parts
        if self._plan.config.training.pairs:
            self._find_references()
        largest = try_largest(self._plan, parts.model, parts.optimizer, parts.guard, progress.step)
        parts.memory.choose(progress.step, largest)
        if self._plan.resume is None:
            began = time.monotonic()
            before = self._held_out.loss(progress.step)
            if before is not None:
                progress.loss_before = before.loss
                progress.measured_before = dict(before.measures)
            progress.answers_before = tuple(self._held_out.answers())
            self.state.evaluation_s = time.monotonic() - began
            bar.start(before)
        else:
            self._evaluate_if_due()
            bar.start(None)

    def steps(self) -> Iterator[MicroBatches]:
        """The micro-batches of each step that is left; ends early when nothing gets better."""
        for micro_batches in self._plan.schedule.after(self.state.progress.step):
            if self._stops_early():
                self._reporter.note(
                    f"stopping after step {self.state.progress.step}: no lower held-out loss in "
                    f"{self._plan.config.output.early_stopping} evaluations"
                )
                return
            yield micro_batches

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return self._plan.directory

    def training(self) -> dict[str, Any]:
        """The arguments with which `train` trains this run."""
        return {
            "model": self._parts.model,
            "steps": self.steps(),
            "optimizer": self._parts.optimizer,
            "learning_rate": self._parts.learning_rate,
            "max_grad_norm": self._plan.config.training.max_grad_norm,
            "run_backward": self.run_backward,
            "before_step": self.before_step,
            "on_step": self.on_step,
            "loss_scale": self._parts.guard.loss_scale,
            "objective": self._objective,
            "start_step": self.state.progress.step,
        }

    def run_backward(self, backward: Backward, micro_batches: MicroBatches) -> Tensor:
        """The passes of the next step. Errors: as the guard's."""
        self._parts.memory.before_step(self.state.progress.step + 1)
        return self._parts.guard.run_backward(backward, micro_batches)

    def before_step(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may take this step. Errors: `NumericError`."""
        self._parts.memory.after_backward()
        self.is_half = self._parts.guard.before_step(step, loss, grad_norm)
        return self.is_half

    def on_step(self, report: StepReport) -> None:
        """A step is done: count, log, evaluate, save, stop, whatever of it is due."""
        self._parts.memory.after_step()
        progress, output = self.state.progress, self._plan.config.output
        progress.step = report.step
        progress.tokens += report.tokens
        progress.seconds += report.seconds
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            progress.last_loss = report.loss
            if progress.first_loss is None:
                progress.first_loss = report.loss
        else:
            progress.skipped_steps += 1
        self.is_half = False
        peak = self._parts.memory.peak()
        self._bar.step(report, peak)
        if report.step % output.logging_steps == 0 or report.step == self._plan.schedule.num_steps:
            said = {name: value for name, value in asdict(report).items() if value is not None}
            measures = said.pop("measures")
            self._log({**said, **measures, "peak_bytes": peak})
        self._signals.raise_if_received()
        self._evaluate_if_due()
        self.state.save_if_due()
        self._signals.raise_if_received()

    def leave_step(self) -> None:
        """A step is given up: what it has made is forgotten."""
        self._parts.memory.after_step()
        self._parts.guard.drop_gradients()

    def full_in_optimizer(self, error: Exception) -> Exception | None:
        """What is said of a device that was full as the optimizer took a step; None if it wasn't.

        `is_half` then, and whatever else failed there, the step may be half taken: not to be saved.
        """
        step, checkpoint = self.state.progress.step + 1, self.state.last_checkpoint
        return half_taken(self._plan, step, error, checkpoint) if self.is_half else None

    def stopped(self, signal_number: int) -> Stopped:
        """Save where the run stands; returns what to raise. Errors as `save`."""
        path = self.state.save()
        if self.state.finished:
            return Stopped(
                signal_number, f"{self._place.path} is finished", "nothing is left to do"
            )
        if path is None:
            return Stopped(signal_number, "before the first step was done, nothing is kept")
        return Stopped(
            signal_number,
            f"after step {self.state.progress.step} of {self._plan.schedule.num_steps}, "
            f"saved in {path}",
            "go on with the same command and --resume_from_checkpoint auto",
        )

    def finish(self) -> None:
        """Evaluate, write the results, remove the checkpoints that nobody asked for, and show."""
        plan, config, state = self._plan, self._plan.config, self.state
        with self._best_adapter():
            after = self._held_out.loss(state.progress.step)
            answers = [list(state.progress.answers_before), self._held_out.answers()]
            record = result_record(
                replace(plan, memory=self._parts.replan.memory),
                state.progress,
                self._parts.memory,
                after,
                max_rows=self._parts.guard.max_rows,
                took_best=bool(state.best),
            )
            write_result(plan, self._place, record)
        state.finish()
        questions = self._held_out.questions
        self._reporter.answers(questions, answers)
        prompts = [row.content["prompt"] for row in questions]
        self._reporter.result(record, plan.directory, config, prompts, plan.rows.is_chat)

    def _find_references(self) -> None:
        """Have what pairs are measured against, before the first step of this process."""
        found, plan = self.state.find_references(self._held_out), self._plan
        self._held_out.reference = found.get("eval")
        self._plan = replace(plan, schedule=replace(plan.schedule, reference=found["train"]))

    @contextlib.contextmanager
    def _best_adapter(self) -> Iterator[None]:
        """Inside, the adapter is the best one where it is asked for; the last one where it fails.

        What is saved then is where the run stands.
        """
        last = {
            parameter: parameter.detach().clone()
            for parameter in self._parts.names
            if self.state.best
        }
        if self.state.best:
            for parameter, name in self._parts.names.items():
                parameter.data.copy_(self.state.best[name])
            assert self.state.progress.best is not None
            self._reporter.note(
                f"taking the adapter of step {self.state.progress.best[0]}, the best one"
            )
        try:
            yield
        except BaseException:
            for parameter, values in last.items():
                parameter.data.copy_(values)
            raise

    def _stops_early(self) -> bool:
        patience, best = self._plan.config.output.early_stopping, self.state.progress.best
        if patience is None or best is None:
            return False
        return sum(step > best[0] for step, _ in self.state.progress.history) >= patience

    def _evaluate_if_due(self) -> None:
        """The held-out loss after this step, unless it is known; the best adapter is kept."""
        output, progress = self._plan.config.output, self.state.progress
        known = progress.history and progress.history[-1][0] == progress.step
        # Of the last step it is asked whether it is the best, wherever it stands.
        is_last = output.load_best and progress.step == self._plan.schedule.num_steps
        due = output.eval_steps and (progress.step % output.eval_steps == 0 or is_last)
        if not due or known:
            return
        found = self._held_out.loss(progress.step)
        if found is None:
            return
        progress.history = (*progress.history, (progress.step, found.loss))
        self._reporter.evaluation(progress.step, found)
        if output.load_best and progress.best == progress.history[-1]:
            self.state.keep_best()

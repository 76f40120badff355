"""One training run around its steps: what is evaluated, saved, logged and shown between them.

`Run` has what `train` needs (a model, micro-batches, an optimizer) and what it calls: `before_step`
before each optimizer step, `on_step` after it. Everything that the rest of the run depends on is
in `_state`, so that a checkpoint holds it and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.base.load import read_weights
from qlora_kit.data.batch import Batch, eval_batches
from qlora_kit.data.encode import prompt_ids
from qlora_kit.data.rows import Row
from qlora_kit.device import empty_cache, memory_name
from qlora_kit.errors import CheckpointError, QloraKitError, ResourceError
from qlora_kit.export.companions import write_companions
from qlora_kit.files.atomic import sync
from qlora_kit.generation.decode import answers
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.inject import inject_lora, train_loaded
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.memory.profiler import MemoryProfiler
from qlora_kit.options.yaml_file import dump
from qlora_kit.process.out_of_memory import is_out_of_memory
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.run.directory import RESULT, RunDirectory, run_directory
from qlora_kit.run.metrics import (
    METRICS_FILE,
    MetricsLog,
    start_trackers,
    write_json,
    write_text,
)
from qlora_kit.run.model_card import model_card
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.reporter import Reporter, StepReporter
from qlora_kit.run.result import Memory, Progress, result_record
from qlora_kit.run.trial import try_largest
from qlora_kit.training.checkpoint import (
    Checkpoint,
    drop_after,
    prune,
    prune_unplanned,
    save_checkpoint,
    saved_bytes,
    take,
)
from qlora_kit.training.guard import Guard
from qlora_kit.training.loop import Backward, StepReport
from qlora_kit.training.loss import Evaluation, evaluate
from qlora_kit.training.optimizer import (
    learning_rates,
    make_optimizer,
    optimizer_state,
    paging_note,
    restore_optimizer,
)
from qlora_kit.training.prepare import prepare_model

ANSWER_TOKENS = 64
EVAL_ROWS = 8
"""Rows of a batch in evaluation, at least."""


@contextlib.contextmanager
def open_run(plan: PreparedRun, reporter: Reporter, signals: StopSignals) -> Iterator[Run]:
    """Hold the run's directory, load the model, restore the checkpoint; then hand over.

    When the block stops between two steps (a signal, a numeric error, a full device), what was
    reached is saved first. Errors: those of loading, `ResourceError`, `Stopped`.
    """
    output = plan.config.output
    with contextlib.ExitStack() as stack:
        plan, place = _hold_directory(plan, stack)
        run = Run(plan, place, reporter, signals)
        resumed = None if plan.resume is None else run.progress.step
        config, note = plan.config.as_flat(), reporter.note
        trackers = start_trackers(output.report_to, place.path, config, note)
        with (
            MetricsLog(place.path, trackers=trackers, resume_step=resumed, note=note) as log,
            reporter.progress(plan.schedule.num_steps, memory_name(plan.base.device)) as bar,
            signals.between_steps(),
        ):
            try:
                run.begin(log, bar)
                yield run
            except Stopped as stopped:
                run.leave_step()
                raise run.stopped(stopped.signal_number) from None
            except (QloraKitError, OSError):
                run.leave_step()
                with contextlib.suppress(QloraKitError, OSError):
                    run.save()
                raise


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


class Run:
    """A model with adapters, its optimizer, and what happens between its steps."""

    def __init__(
        self, plan: PreparedRun, place: RunDirectory, reporter: Reporter, signals: StopSignals
    ) -> None:
        training = plan.config.training
        reporter.loading(plan.base)
        profiler = MemoryProfiler(plan.base.device)
        with profiler.loading() as counter:
            self.model = _with_adapters(plan, counter)
        if left_alone := prepare_model(self.model, training, plan.memory.levels):
            reporter.note(left_alone)
        self.optimizer = make_optimizer(
            training.optim, self.model.parameters(), training.learning_rate, training.weight_decay
        )
        if note := paging_note(training.optim, self.model.parameters(), plan.base.device):
            reporter.note(note)
        self.learning_rate = learning_rates(training, plan.schedule.num_steps)
        self.guard = Guard(
            self.model, signals=signals, note=reporter.note, rows_of=self._rows_of_step
        )
        self.progress = Progress()
        self._plan, self._place, self._reporter, self._signals = plan, place, reporter, signals
        self._memory = Memory(self.model, self.optimizer, profiler)
        self._names: dict[Tensor, str] = {
            p: name for name, p in self.model.named_parameters() if p.requires_grad
        }
        self._questions = _questions(plan)
        self._best: dict[str, Tensor] = {}
        self._saved_step = -1
        self._finished = False
        self._evaluation_s = 0.0
        self._eval_rows = max(EVAL_ROWS, training.batch_size)
        if plan.resume is not None:
            self._restore(plan.resume)

    def begin(self, log: MetricsLog, bar: StepReporter) -> None:
        """Measure what the run starts from, unless the checkpoint says it."""
        self._log, self._bar = log, bar
        self._saved_s = self._asked_s = time.monotonic()
        progress = self.progress
        largest = try_largest(self._plan, self.model, self.optimizer, self.guard, progress.step)
        self._memory.choose(progress.step, largest)
        if self._plan.resume is None:
            began = time.monotonic()
            before = self._held_out_loss()
            progress.loss_before = None if before is None else before.loss
            with self._signals.droppable(at_once=True):
                progress.answers_before = tuple(self._answers())
            self._evaluation_s = time.monotonic() - began
            bar.start(before)
        else:
            self._evaluate_if_due()

    def steps(self) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each step that is left; ends early when nothing gets better."""
        for micro_batches in self._plan.schedule.after(self.progress.step):
            if self._stops_early():
                self._reporter.note(
                    f"stopping after step {self.progress.step}: no lower held-out loss in "
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
            "model": self.model,
            "steps": self.steps(),
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "max_grad_norm": self._plan.config.training.max_grad_norm,
            "run_backward": self.run_backward,
            "before_step": self.before_step,
            "on_step": self.on_step,
            "start_step": self.progress.step,
        }

    def run_backward(self, backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
        """The passes of the next step. Errors: as the guard's."""
        self._memory.before_step(self.progress.step + 1)
        return self.guard.run_backward(backward, micro_batches)

    def before_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the optimizer may take this step. Errors: `NumericError`."""
        self._memory.after_backward()
        return self.guard.before_step(step, loss, grad_norm)

    def on_step(self, report: StepReport) -> None:
        """A step is done: count, log, evaluate, save, stop, whatever of it is due."""
        self._memory.after_step()
        progress, output = self.progress, self._plan.config.output
        progress.step = report.step
        progress.tokens += report.tokens
        progress.seconds += report.seconds
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            progress.last_loss = report.loss
            if progress.first_loss is None:
                progress.first_loss = report.loss
        else:
            progress.skipped_steps += 1
        peak = self._memory.peak()
        self._bar.step(report, peak)
        if report.step % output.logging_steps == 0 or report.step == self._plan.schedule.num_steps:
            self._log.write({**asdict(report), "peak_bytes": peak})
        self._signals.raise_if_received()
        self._evaluate_if_due()
        if output.save_steps and report.step % output.save_steps == 0:
            self.save()
        elif self._is_time_to_save():
            self._save_by_the_clock()
        self._signals.raise_if_received()

    def _is_time_to_save(self) -> bool:
        """Whether `save_minutes` would be over before this is asked again, or the run finished."""
        now, limit = time.monotonic(), 60 * self._plan.config.output.save_minutes
        coming, self._asked_s = now - self._asked_s, now
        if self.progress.step == self._plan.schedule.num_steps:
            coming = self._evaluation_s
        return 0 < limit < now - self._saved_s + coming

    def _save_by_the_clock(self) -> None:
        """A checkpoint that nobody asked for ends no run. Errors: `NumericError`."""
        try:
            self.save()
        except ResourceError as error:
            self._saved_s = time.monotonic()
            self._reporter.note(f"no checkpoint was written: {error.problem}; training goes on")

    def save(self) -> Path | None:
        """Write a checkpoint of where the run stands, once for a step, then prune older ones.

        Where there is no room, those that it would replace go first, and it is tried again. None
        before a step was taken and once the run is finished. Errors: `ResourceError`,
        `NumericError`.
        """
        run, step = self._place.path, self.progress.step
        output = self._plan.config.output
        limit, every = output.save_total_limit, output.save_steps
        if step == self._saved_step:
            return run / f"checkpoint-{step}"
        if self.progress.first_loss is None or self._finished:
            return None
        tensors, state = self._state()

        def write() -> Path:
            return save_checkpoint(
                run,
                step,
                tensors,
                state,
                lambda directory: save_adapter(self._plan.base, directory),
            )

        try:
            try:
                path = write()
            except (ResourceError, OSError):
                if not prune(run, max(1, limit - 1), every, self._saved_step):
                    raise
                path = write()
        except OSError as error:
            raise ResourceError(
                f"checkpoint-{step} of {saved_bytes(tensors)} bytes in {run}: {error.strerror}",
                "free some space or choose another place with --output_dir",
            ) from error
        self._saved_step, self._saved_s = step, time.monotonic()
        self._place.keep()
        drop_after(run, step)
        prune(run, limit, every)
        return path

    def leave_step(self) -> None:
        """A step is given up: what it has made is forgotten."""
        self._memory.after_step()
        self.guard.drop_gradients()

    def stopped(self, signal_number: int) -> Stopped:
        """Save where the run stands; returns what to raise. Errors as `save`."""
        path = self.save()
        if self._finished:
            return Stopped(
                signal_number, f"{self._place.path} is finished", "nothing is left to do"
            )
        if path is None:
            return Stopped(signal_number, "before the first step was done, nothing is kept")
        return Stopped(
            signal_number,
            f"after step {self.progress.step} of {self._plan.schedule.num_steps}, saved in {path}",
            "go on with the same command and --resume_from_checkpoint auto",
        )

    def finish(self) -> None:
        """Evaluate, write the results, remove the checkpoints that nobody asked for, and show."""
        plan, config, progress = self._plan, self._plan.config, self.progress
        with self._best_adapter():
            after = self._held_out_loss()
            with self._signals.droppable(at_once=True):
                answers = [list(progress.answers_before), self._answers()]
            record = result_record(
                plan,
                progress,
                self._memory,
                after,
                max_rows=self.guard.max_rows,
                took_best=bool(self._best),
            )
            with self._place.result() as directory:
                save_adapter(plan.base, directory)
                write_companions(
                    self.model,
                    plan.base.tokenizer,
                    plan.base.source.directory,
                    directory,
                    own_templates=config.data.chat_template is not None,
                )
                write_text(directory / "config.yaml", dump(config.as_flat()))
                write_text(directory / "README.md", model_card(record))
                write_json(directory / RESULT, record)
                sync(self._place.path / METRICS_FILE)
        self._finished = True
        self._place.keep()
        prune_unplanned(self._place.path, config.output.save_steps)
        self._reporter.answers(self._questions, answers)
        prompts = [row.content["prompt"] for row in self._questions]
        as_chat = config.data.instruction_as_chat and plan.rows.format == "instruction"
        is_chat = as_chat or plan.rows.format == "messages"
        self._reporter.result(record, plan.directory, config, prompts, is_chat)

    @contextlib.contextmanager
    def _best_adapter(self) -> Iterator[None]:
        """Inside, the adapter is the best one where it is asked for; the last one where it fails.

        What is saved then is where the run stands.
        """
        last = {parameter: parameter.detach().clone() for parameter in self._names if self._best}
        if self._best:
            for parameter, name in self._names.items():
                parameter.data.copy_(self._best[name])
            assert self.progress.best is not None
            self._reporter.note(f"taking the adapter of step {self.progress.best[0]}, the best one")
        try:
            yield
        except BaseException:
            for parameter, values in last.items():
                parameter.data.copy_(values)
            raise

    def _stops_early(self) -> bool:
        patience, best = self._plan.config.output.early_stopping, self.progress.best
        if patience is None or best is None:
            return False
        return sum(step > best[0] for step, _ in self.progress.history) >= patience

    def _evaluate_if_due(self) -> None:
        """The held-out loss after this step, unless it is known; the best adapter is kept."""
        output, progress = self._plan.config.output, self.progress
        known = progress.history and progress.history[-1][0] == progress.step
        if not output.eval_steps or progress.step % output.eval_steps or known:
            return
        found = self._held_out_loss()
        if found is None:
            return
        progress.history = (*progress.history, (progress.step, found.loss))
        self._reporter.evaluation(progress.step, found)
        if output.load_best and progress.best == progress.history[-1]:
            self._best = {name: p.detach().to("cpu", copy=True) for p, name in self._names.items()}

    def _held_out_loss(self) -> Evaluation | None:
        held_out = self._plan.held_out
        if held_out is None:
            return None
        while True:
            rows = self._eval_rows
            try:
                with self._signals.droppable(at_once=True):
                    # Forward alone of as many tokens takes less than the step that is planned.
                    tokens = self._plan.memory.tokens
                    batches = eval_batches(held_out.rows, rows, self._plan.schedule.pad_id, tokens)
                    return evaluate(self.model, batches)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    # Of a kind that lets the steps so far be saved.
                    raise ResourceError(
                        f"out of memory with one held-out row after step {self.progress.step}",
                        "lower --max_length, use --bits 4, or --eval_fraction 0",
                    ) from error
            # Here, not above: the exception held the frames, and they the activations.
            empty_cache()
            self._eval_rows = -(-rows // 2)
            self._reporter.note(
                f"out of memory with {rows} held-out rows at a time: going on with "
                f"{self._eval_rows}"
            )

    def _answers(self) -> list[str]:
        tokenizer = self._plan.base.tokenizer
        prompts = [
            prompt_ids(row.content["prompt"], tokenizer, literal=row.literal)
            for row in self._questions
        ]
        limit = _answer_tokens(self._plan.base.context)
        return list(answers(self.model, tokenizer, prompts, max_new_tokens=limit))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors, and the rest for JSON."""
        states, numbers = optimizer_state(self.optimizer, self._names)
        tensors = {f"master.{name}": p.detach().cpu() for p, name in self._names.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in states.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        state = {
            "config": self._plan.config.as_flat(),
            "identity": dict(self._plan.identity),
            "progress": asdict(self.progress),
            "guard": self.guard.state(),
            "optimizer": numbers,
        }
        return tensors, state

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint stands. Errors: `CheckpointError`; the run is then unusable."""
        masters = {name: parameter.detach() for parameter, name in self._names.items()}
        saved = _parts(checkpoint.tensors)
        try:
            numbers = dict(checkpoint.state["optimizer"])
            progress = Progress.read(checkpoint.state["progress"])
            self.guard.restore(checkpoint.state["guard"])
            if progress.step != checkpoint.step:
                raise ValueError(f"step {progress.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'}: lacks or misstates {error}",
                "use another checkpoint",
            ) from error
        for name, tensor in take(saved["master"], masters, checkpoint.path).items():
            masters[name].copy_(tensor)
        restore_optimizer(self.optimizer, self._names, saved["optimizer"], numbers)
        if saved["best"]:
            self._best = take(saved["best"], masters, checkpoint.path)
        self.progress = progress
        if checkpoint.path.parent.resolve() == self._place.path.resolve():
            self._saved_step = checkpoint.step

    def _rows_of_step(self, step: int) -> str:
        """The places of a step's rows among those that are trained on, counted from 0."""
        return ", ".join(map(str, self._plan.schedule.rows_of(step)))


def _with_adapters(plan: PreparedRun, counter: StorageCounter) -> Any:
    """The base's model with new adapters, or with the one that the run goes on from."""
    counter.at("load")
    model, seed = read_weights(plan.base, counter.tag), plan.config.training.seed
    counter.at("inject")
    if plan.start.files is None:
        return inject_lora(model, plan.config.lora, seed=seed)
    # The base was compared when the adapter's files were opened.
    load_adapter(plan.base, plan.start.files, allow_other_base=True, seed=seed)
    return train_loaded(model, plan.config.lora, seed=seed)


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint by the first part of their names, without it."""
    parts: dict[str, dict[str, Tensor]] = {"master": {}, "optimizer": {}, "best": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise CheckpointError(f"the checkpoint holds {name}", "use another checkpoint")
        parts[part][rest] = tensor
    return parts


def _questions(plan: PreparedRun) -> list[Row]:
    """The first held-out rows with a prompt that leaves room for an answer in the context."""
    count, context = plan.config.output.sample_prompts, plan.base.context
    room = context - _answer_tokens(context)
    found: list[Row] = []
    for row in plan.rows.evaluation:
        if len(found) == count:
            break
        if "completion" in row.content:
            ids = prompt_ids(row.content["prompt"], plan.base.tokenizer, literal=row.literal)
            if 0 < len(ids) <= room:
                found.append(row)
    return found


def _answer_tokens(context: int) -> int:
    return min(ANSWER_TOKENS, context // 2)

"""What a run has reached, and the checkpoints that hold it.

Everything that the rest of a run depends on is here or in the adapters and the optimizer, so that
a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.errors import CheckpointError, ResourceError
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.run.assembly import Assembled
from qlora_kit.run.directory import RunDirectory
from qlora_kit.run.evaluation import HeldOut
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.reference import References, find_references
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.result import Progress
from qlora_kit.training.checkpoint import Checkpoint, save_checkpoint, saved_bytes, take
from qlora_kit.training.checkpoint_folder import drop_after, prune, prune_unplanned
from qlora_kit.training.optimizer import optimizer_state, restore_optimizer


class RunState:
    """How far a run is, its best adapter so far (on the CPU, by name), and when it was saved."""

    def __init__(
        self, plan: PreparedRun, place: RunDirectory, parts: Assembled, reporter: Reporter
    ) -> None:
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.references: References = {}
        """Of pairs the log-probabilities that the reference gives their rows."""
        self.finished = False
        self.evaluation_s = 0.0
        """What an evaluation takes, as far as one was timed."""
        self._plan, self._place, self._parts, self._reporter = plan, place, parts, reporter
        self._saved_step = -1
        self._saved_s = self._asked_s = time.monotonic()
        if plan.resume is not None:
            self._restore(plan.resume)

    def find_references(self, held_out: HeldOut) -> References:
        """What pairs are measured against, from the checkpoint or computed. Errors as there."""
        self.references = find_references(
            self._plan, self._parts.model, held_out, self.references, self._reporter.note
        )
        return self.references

    def begin(self) -> None:
        """The clock by which checkpoints are written begins."""
        self._saved_s = self._asked_s = time.monotonic()

    def keep_best(self) -> None:
        """Keep a copy of the adapter as it is now."""
        self.best = {name: p.detach().to("cpu", copy=True) for p, name in self._parts.names.items()}

    def finish(self) -> None:
        """The result is written: checkpoints that nobody asked for go."""
        self.finished = True
        self._place.keep()
        prune_unplanned(self._place.path, self._plan.config.output.save_steps)

    @property
    def last_checkpoint(self) -> Path | None:
        """The one that a run that ends here is resumed from."""
        if self._saved_step > 0:
            return self._place.path / f"checkpoint-{self._saved_step}"
        return None if self._plan.resume is None else self._plan.resume.path

    def save_if_due(self) -> None:
        """Write the checkpoint that is due after this step, by its number or by the clock."""
        every = self._plan.config.output.save_steps
        if every and self.progress.step % every == 0:
            self.save()
        elif self._is_time_to_save():
            self._save_by_the_clock()

    def _is_time_to_save(self) -> bool:
        """Whether `save_minutes` would be over before this is asked again, or the run finished."""
        now, limit = time.monotonic(), 60 * self._plan.config.output.save_minutes
        coming, self._asked_s = now - self._asked_s, now
        if self.progress.step == self._plan.schedule.num_steps:
            coming = self.evaluation_s
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
        if self.progress.first_loss is None or self.finished:
            return None
        tensors, state = self._state()

        def write() -> Path:
            return save_checkpoint(
                run,
                step,
                tensors,
                state,
                lambda directory: save_adapter(
                    self._plan.base, directory, row_format=self._plan.rows.form
                ),
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

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors, and the rest for JSON."""
        states, numbers = optimizer_state(self._parts.optimizer, self._parts.names)
        tensors = {f"master.{name}": p.detach().cpu() for p, name in self._parts.names.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in states.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"reference.{name}": tensor for name, tensor in self.references.items()}
        state = {
            "config": self._plan.config.as_flat(),
            "identity": dict(self._plan.identity),
            "progress": asdict(self.progress),
            "guard": self._parts.guard.state(),
            "optimizer": numbers,
        }
        return tensors, state

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint stands. Errors: `CheckpointError`; the run is then unusable."""
        masters = {name: parameter.detach() for parameter, name in self._parts.names.items()}
        saved = _parts(checkpoint.tensors)
        try:
            numbers = dict(checkpoint.state["optimizer"])
            progress = Progress.read(checkpoint.state["progress"])
            self._parts.guard.restore(checkpoint.state["guard"])
            if progress.step != checkpoint.step:
                raise ValueError(f"step {progress.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'}: lacks or misstates {error}",
                "use another checkpoint",
            ) from error
        for name, tensor in take(saved["master"], masters, checkpoint.path).items():
            masters[name].copy_(tensor)
        restore_optimizer(self._parts.optimizer, self._parts.names, saved["optimizer"], numbers)
        if saved["best"]:
            self.best = take(saved["best"], masters, checkpoint.path)
        self.references = saved["reference"]
        self.progress = progress
        if checkpoint.path.parent.resolve() == self._place.path.resolve():
            self._saved_step = checkpoint.step


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint by the first part of their names, without it."""
    names = ("master", "optimizer", "best", "reference")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise CheckpointError(f"the checkpoint holds {name}", "use another checkpoint")
        parts[part][rest] = tensor
    return parts

"""What a run has come to: its progress, its memory, and `run.json` made of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.memory.measure import (
    adapter_bytes,
    describe_device,
    optimizer_bytes,
    peak_bytes,
    weight_bytes,
)
from qlora_kit.training.loss import Evaluation
from qlora_kit.training.record import (
    EvalRecord,
    MemoryRecord,
    RunRecord,
    TrainRecord,
    run_record,
)

if TYPE_CHECKING:
    from qlora_kit.commands.run import Plan


@dataclass
class Progress:
    """What has happened so far; `history` has (step, held-out loss). A checkpoint holds it all."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    loss_before: float | None = None
    history: tuple[tuple[int, float], ...] = ()
    answers_before: tuple[str, ...] = ()

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest held-out loss after a step, the first one of equals."""
        # One that is not a number is lower than nothing, and nothing is lower than it.
        finite = (entry for entry in self.history if math.isfinite(entry[1]))
        return min(finite, key=lambda entry: entry[1], default=None)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Progress:
        """What `asdict` made of one. Errors: `TypeError`, `ValueError` for anything else."""
        found = cls(**saved)
        for name in ("step", "tokens", "skipped_steps"):
            if type(count := getattr(found, name)) is not int or count < 0:
                raise ValueError(f"{name} {count!r}")
        for name in ("seconds", "first_loss", "last_loss", "loss_before"):
            value = getattr(found, name)
            if type(value) not in (int, float) and (value is not None or name == "seconds"):
                raise ValueError(f"{name} {value!r}")
        found.history = tuple((int(at), float(loss)) for at, loss in found.history)
        found.answers_before = tuple(map(str, found.answers_before))
        return found


class Memory:
    """What a run measured of its memory: components while they are there, and the peak."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._device = model.get_input_embeddings().weight.device
        self._measured = {**weight_bytes(model), **adapter_bytes(model)}
        self._has_gradients = False

    def after_backward(self) -> None:
        """Gradients exist only between backward and the optimizer: looked at once."""
        if not self._has_gradients:
            self._has_gradients = True
            self._measured |= adapter_bytes(self._model)

    def peak(self) -> int:
        """The peak so far in bytes."""
        return peak_bytes(self._device)

    def record(self, planned: Mapping[str, int]) -> MemoryRecord:
        """The `memory` part of run.json."""
        measured = {**self._measured, **optimizer_bytes(self._optimizer), "peak": self.peak()}
        return {
            "device": describe_device(self._device),
            "planned": planned,
            "measured": measured,
        }


def result_record(
    plan: Plan,
    model: Any,
    progress: Progress,
    memory: Memory,
    after: Evaluation | None,
    *,
    max_rows: int | None,
    took_best: bool,
) -> RunRecord:
    """`run.json` of a finished run; `after` is its held-out loss at the end."""
    info = model.base_info
    return run_record(
        config=plan.config.as_flat(),
        model={
            "name": info.name,
            "revision": info.revision,
            "fingerprint": info.fingerprint,
            "parameters": info.parameters,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "weight_bytes": weight_bytes(model)["weights"],
        },
        data={
            "rows": len(plan.encoded.rows),
            "skipped": sum(plan.encoded.skipped.values()),
            "tokens": plan.encoded.tokens,
            "supervised_tokens": plan.encoded.supervised_tokens,
        },
        train=_train_record(progress, max_rows, took_best),
        evaluation=_eval_record(progress, after),
        memory=memory.record(plan.memory.planned),
    )


def _train_record(progress: Progress, max_rows: int | None, took_best: bool) -> TrainRecord:
    record: TrainRecord = {
        "steps": progress.step,
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "tokens_per_s": progress.tokens / max(progress.seconds, 1e-9),
        "first_loss": math.nan if progress.first_loss is None else progress.first_loss,
        "last_loss": math.nan if progress.last_loss is None else progress.last_loss,
    }
    if progress.skipped_steps:
        record["skipped_steps"] = progress.skipped_steps
    if max_rows is not None:
        record["micro_batch_rows"] = max_rows
    if took_best and progress.best is not None:
        record["best_step"] = progress.best[0]
    return record


def _eval_record(progress: Progress, after: Evaluation | None) -> EvalRecord | None:
    if after is None or progress.loss_before is None:
        return None
    record: EvalRecord = {
        "loss_before": progress.loss_before,
        "loss_after": after.loss,
        "tokens": after.tokens,
    }
    if progress.history:
        record["history"] = [{"step": step, "loss": loss} for step, loss in progress.history]
    return record

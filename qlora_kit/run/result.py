"""The results of a run: its progress, its memory, and `run.json` made of both.

What `run.json` holds, each part of it where it applies:

- `config`, `versions`: the options of the run, and what it ran with
- `model`: the base and the adapters on it; of a multimodal checkpoint `adapter_keys`, which is
  `wrapper` or `text`
- `data`: the rows trained on, without those `skipped`; `unused` counts the rows that have a field
  which nothing reads, by its name; the fingerprints are hashes of the encoded rows that were
  trained on and held out
- `train`: the optimizer steps and what they gave; `skipped_steps` were not finite,
  `micro_batch_rows` is what the device was found to hold, `best_step` the one that was saved
- `eval`: losses in nats a supervised token of the held-out rows, the same rows each time; of pairs
  the mean loss of one, and their `margin` and `accuracy`; `history` has step and loss of each
  evaluation in between; all of it is None where nothing was held out
- `memory`: bytes of tensors by component, `peak` among them, `planned` and `measured`; `phases` has
  the peak of each phase and its module, `peak_at` phase and module of the largest; `process` is the
  most that the whole process held, which `process_is` says in words: it is not to be compared with
  bytes of tensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.device.found import describe_device, peak_bytes, reserved_bytes
from qlora_kit.device.target import has_own_memory
from qlora_kit.memory.counter import adapter_bytes, optimizer_bytes, weight_bytes
from qlora_kit.memory.profiler import MemoryProfiler
from qlora_kit.run.metrics import versions
from qlora_kit.training.loss import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.plan.memory_plan import MemoryPlan
    from qlora_kit.run.prepare import PreparedRun


RESIDENT = "resident at most: tensors, Python, libraries and files, so not what a plan counts"
BLOCKS = "reserved at most: the allocator's blocks, with room between tensors that no plan counts"
"""What the memory of a process is, on the CPU and on CUDA."""


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
    measured_before: dict[str, float] = field(default_factory=dict)
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
        found.measured_before = {str(k): float(v) for k, v in dict(found.measured_before).items()}
        found.answers_before = tuple(map(str, found.answers_before))
        return found


class Memory:
    """What a run measured of its memory: some of its steps are counted, tensor by tensor.

    They are the first two, because only the second finds what the first leaves (workspaces, blocks
    of the allocator), and the one with the largest batch. `profiler` has counted how the model was
    loaded.
    """

    def __init__(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, profiler: MemoryProfiler
    ) -> None:
        self._model, self._optimizer, self._profiler = model, optimizer, profiler
        self._device = model.device
        self._held = {**weight_bytes(model), **adapter_bytes(model)}
        self._counted: set[int] = set()

    def choose(self, start_step: int, largest_step: int) -> None:
        """Steps are counted from 1; `start_step` of them are done."""
        self._counted = {start_step + 1, start_step + 2, largest_step}

    def before_step(self, step: int) -> None:
        """A step begins."""
        if step in self._counted:
            self._profiler.begin(self._model, self._optimizer)

    def after_backward(self) -> None:
        """The optimizer's part of the step begins."""
        self._profiler.before_optimizer()

    def after_step(self) -> None:
        """The step is over, or given up."""
        self._profiler.end()

    def peak(self) -> int:
        """The peak so far in bytes."""
        return max(peak_bytes(self._device), self._profiler.highest)

    def record(self, plan: MemoryPlan) -> dict[str, Any]:
        """The `memory` part of run.json."""
        counted, phase, module = self._profiler.peak
        on_gpu = has_own_memory(self._device)
        measured = {**self._held, **self._profiler.sizes, **optimizer_bytes(self._optimizer)}
        measured["weights"] = self._held["weights"]
        measured["peak"] = self.peak() if on_gpu else counted
        return {
            "device": describe_device(self._device),
            "planned": plan.planned,
            "placement": plan.placed() or "all on the device",
            "measured": measured,
            "phases": self._profiler.record(),
            "peak_at": " ".join(part for part in (phase, module) if part),
            "process": reserved_bytes(self._device),
            "process_is": BLOCKS if on_gpu else RESIDENT,
        }


def result_record(
    plan: PreparedRun,
    progress: Progress,
    memory: Memory,
    after: Evaluation | None,
    *,
    max_rows: int | None,
    took_best: bool,
) -> dict[str, Any]:
    """`run.json` of a finished run; `after` is its held-out loss at the end."""
    info, model = plan.base.info, plan.base.model
    described: dict[str, Any] = {
        "name": info.name,
        "revision": info.revision,
        "fingerprint": info.fingerprint,
        "parameters": info.parameters,
        "source_dtype": info.source_dtype,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": weight_bytes(model)["weights"],
    }
    if (left := plan.base.in_16_bits) is not None:
        described["in_16_bits"] = left
    if plan.base.wrapper is not None:
        described["adapter_keys"] = plan.config.lora.adapter_keys or "wrapper"
    return {
        "config": plan.config.as_flat(),
        "versions": versions(),
        "model": described,
        "data": {
            "rows": plan.encoded.pairs or len(plan.encoded.rows),
            "skipped": sum(plan.encoded.skipped.values()),
            "tokens": plan.encoded.tokens,
            "supervised_tokens": plan.encoded.supervised_tokens,
            "unused": dict(plan.encoded.unused),
            "fingerprint": plan.identity["data"],
            "eval_fingerprint": plan.identity["eval_data"],
        },
        "train": _train_record(progress, max_rows, took_best),
        "eval": _eval_record(progress, after),
        "memory": memory.record(plan.memory),
    }


def _train_record(progress: Progress, max_rows: int | None, took_best: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
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


def _eval_record(progress: Progress, after: Evaluation | None) -> dict[str, Any] | None:
    if after is None or progress.loss_before is None:
        return None
    record: dict[str, Any] = {
        "loss_before": progress.loss_before,
        "loss_after": after.loss,
        "tokens": after.tokens,
    }
    measured = (("before", progress.measured_before), ("after", after.measures))
    for when, values in measured:
        record.update({f"{name}_{when}": value for name, value in values.items()})
    if progress.history:
        record["history"] = [{"step": step, "loss": loss} for step, loss in progress.history]
    return record

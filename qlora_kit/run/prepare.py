"""A request to a run that may begin: no weight is read for it, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_kit.data.batch import padding_id, padding_note
from qlora_kit.data.outcome import EncodedRows
from qlora_kit.data.rows import Rows
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.errors import ConfigError
from qlora_kit.plan.memory_plan import MemoryPlan
from qlora_kit.run.encoding import chats_text, encode_run
from qlora_kit.run.planned import measured_bits, planned_run
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.request import RunRequest
from qlora_kit.run.resolve import ResolvedRun, resolve_run
from qlora_kit.run.resume import check_resumed, identity_of

FEW_STEPS, ENOUGH_STEPS = 20, 50


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ResolvedRun):
    """A run whose options, files and shapes were checked, before a weight is read.

    `schedule` has all of its steps. `identity` tells the base and the encoded rows apart from
    others, whatever they are called. `memory` says what it will take, and which layers recompute.
    """

    rows: Rows
    encoded: EncodedRows
    held_out: EncodedRows | None
    schedule: StepSchedule
    identity: Mapping[str, str | None]
    memory: MemoryPlan


class FinishedRun(NamedTuple):
    """The directory of a run that was to be resumed, and has nothing left to do."""

    directory: Path
    is_finished: Literal[True] = True


def prepare_run(request: RunRequest, reporter: Reporter) -> PreparedRun | FinishedRun:
    """Check everything that can be refused without the weights.

    Nothing is written. Errors: those of the options, the base, the data and the checkpoint,
    `ResourceError` where there is no room for the results.
    """
    resolved = resolve_run(request, reporter)
    config, base, resume, rows = resolved.config, resolved.base, resolved.resume, request.rows
    encoded, held_out = encode_run(config, rows, base)
    schedule = StepSchedule.of_run(
        encoded.rows, config.data, config.training, padding_id(base.tokenizer)
    )
    reporter.data(rows, encoded, held_out, schedule.packs)
    if rows.is_chat:
        reporter.chats(chats_text(config.data, base))
    if note := padding_note(base.tokenizer):
        reporter.note(note)
    identity = identity_of(base, encoded, held_out)
    if resume is not None:
        check_resumed(
            config, identity, resume, resolved.overridden, reporter, finished=resolved.finished
        )
    if resolved.finished:
        reporter.note(f"{resolved.directory}: this run is finished; nothing was changed")
        return FinishedRun(resolved.directory)
    if schedule.num_steps < FEW_STEPS:
        reporter.note(_few_steps(schedule, config.training.max_steps))
    if resume is not None and resume.step > schedule.num_steps:
        raise ConfigError(
            f"{resume.path} stands after step {resume.step}, and this run has {schedule.num_steps}",
            "raise --max_steps or --num_train_epochs",
        )
    schedule, memory = planned_run(config, base, schedule, max(resolved.ranks.values()))
    if schedule.batch_size != config.training.rows:
        reporter.note(
            f"micro-batches of {schedule.batch_size} rows, {schedule.accumulation} a step: as "
            "planned the fastest for the same steps"
        )
    reporter.memory(memory)
    if config.output.compare_bits:
        reporter.bits(measured_bits(config))
    training = config.training.in_micro_batches_of(schedule.batch_size)
    config = replace(config, training=replace(training, optim=memory.optim))
    return PreparedRun(
        **vars(replace(resolved, config=config)),
        rows=rows,
        encoded=encoded,
        held_out=held_out,
        schedule=schedule,
        identity=identity,
        memory=memory,
    )


def _few_steps(schedule: StepSchedule, max_steps: int | None) -> str:
    per_step = schedule.batch_size * schedule.accumulation
    epochs = -(-ENOUGH_STEPS * per_step // schedule.num_sequences)
    longer = f"--max_steps {ENOUGH_STEPS}"
    if max_steps is None:
        longer = f"--num_train_epochs {epochs} or {longer}"
    steps = f"{schedule.num_steps} optimizer step{'s' if schedule.num_steps > 1 else ''}"
    return f"in only {steps} little is learnt: {longer} takes {ENOUGH_STEPS}"

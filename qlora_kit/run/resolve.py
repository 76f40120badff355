"""Options, adapter and checkpoint to one `ResolvedRun`, in which every option has its value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from qlora_kit.base.base import Base
from qlora_kit.base.open import open_base
from qlora_kit.config.run import RunConfig
from qlora_kit.run.continued import Start, fit_adapter, start_of
from qlora_kit.run.encoding import settle_data
from qlora_kit.run.place import default_names, is_finished, output_directory
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.request import RunRequest
from qlora_kit.run.resume import (
    find_checkpoint,
    finished_run,
    overridden_options,
    resumed_training,
)
from qlora_kit.run.targets import check_room_for, check_targets
from qlora_kit.training.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run whose options have their values, and its base, before a row is encoded.

    An `optim` of `auto` gets its value from the plan.

    `names` are those that `directory` may have where none was given: the first one that is free
    when the run begins is taken. `start` has the files of the adapter that the run goes on from,
    checked against the base; `ranks` are those of the adapted linears, by name. `overridden` names
    the options that may differ from those of the checkpoint. A `finished` run is there already,
    and `resume` is what it says of itself.
    """

    config: RunConfig
    base: Base
    directory: Path
    names: Iterator[Path] | None
    resume: Checkpoint | None
    overridden: set[str]
    start: Start
    ranks: Mapping[str, int]
    finished: bool

    def at(self, directory: Path) -> Self:
        """The same run in a directory of another name."""
        output = replace(self.config.output, output_dir=str(directory))
        return replace(self, directory=directory, config=replace(self.config, output=output))


def resolve_run(request: RunRequest, reporter: Reporter) -> ResolvedRun:
    """Decide every option, from the files of the base, the adapter and the checkpoint.

    Nothing is written. Errors: those of the base, the adapter, the checkpoint, the chat template
    and the directory, `ConfigError` for options that do not go together, `ResourceError` where
    there is no room for the results.
    """
    asked = request.config
    # Without its adapter a run is known by its checkpoint alone, which is looked for first.
    searched, found = None, None
    if asked.lora.adapter is not None and request.adapter is None:
        searched = output_directory(asked, asked.base.bits)
        found = find_checkpoint(asked, searched)
    start = start_of(request, None if found is None else found[0])
    base = open_base(start.base, request.files_of(start.base))
    for note in base.notes:
        reporter.note(note)
    asked = replace(asked, base=start.base)
    directory = output_directory(asked, base.quantization.bits)
    finished = is_finished(asked, directory, base)
    names = None
    if asked.output.output_dir is None and asked.output.resume_from_checkpoint is None:
        names = default_names(asked, base.quantization.bits)
    overridden = overridden_options(asked)
    if finished:
        found = finished_run(directory), []
    elif found is None or searched != directory:
        found = find_checkpoint(asked, directory)
    resume, notes = found
    for note in notes:
        reporter.note(note)
    start = fit_adapter(start, base, resume, targets_given=request.targets_given)
    if start.files is not None:
        reporter.note(f"going on with the adapter {start.lora.adapter}")
    lora, base_options = start.lora, base.options(start.base)
    if lora.adapter_dtype == "auto":
        lora = replace(lora, adapter_dtype=base_options.dtype)
    training = resumed_training(asked.training.settled(), resume)
    ranks = check_targets(lora, base, start, reporter)
    if not finished:  # else nothing is written
        check_room_for(base, ranks, directory, training.optim)
    is_chat = request.rows.is_chat
    data = settle_data(asked.data, lora.adapter, base, resume, is_chat=is_chat)
    # How this process began is no part of what the run is.
    output = replace(
        asked.output, output_dir=str(directory), resume_from_checkpoint=None, override=None
    )
    return ResolvedRun(
        config=RunConfig(base_options, data, lora, training, output),
        base=base,
        directory=directory,
        names=names,
        resume=resume,
        overridden=overridden,
        start=start,
        ranks=ranks,
        finished=finished,
    )

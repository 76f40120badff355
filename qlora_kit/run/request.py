"""What a run is asked to be, refused early: by what paths, headers and first rows show.

Nothing here needs torch, whose import takes longer than all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.given_rows import GivenRows
from qlora_kit.data.rows import Rows, load_rows
from qlora_kit.data.source import lasting
from qlora_kit.options.parsed import Parsed, refuse_tokens
from qlora_kit.run.metrics import check_trackers
from qlora_kit.run.place import check_place
from qlora_kit.run.saved_adapter import SavedAdapter, look_at


@dataclass(frozen=True)
class RunRequest:
    """The options of a run as they were given, its rows, and the adapter that it goes on from.

    A run to resume may go on without the adapter that it started from: `adapter` is then None.
    """

    parsed: Parsed
    config: RunConfig
    rows: Rows
    adapter: SavedAdapter | None


def read_request(parsed: Parsed, given: Mapping[str, GivenRows] | None = None) -> RunRequest:
    """Read what a run is asked to be; `given` has rows of the program, as for `load_rows`.

    Errors: those of the options, the rows, the adapter's and the base's files, and of the directory
    where it is named.
    """
    refuse_tokens(parsed)
    data, training = parsed[DataConfig], parsed[TrainingConfig]
    check_trackers(parsed[OutputConfig].report_to)
    rows = load_rows(data, training.seed, given)
    held_out = None if data.eval_data is None else lasting(data.eval_data)
    data = replace(data, data=lasting(data.data), eval_data=held_out)
    config = RunConfig(parsed[BaseConfig], data, parsed[LoRAConfig], training, parsed[OutputConfig])
    adapter, name = None, config.lora.adapter
    resumes = config.output.resume_from_checkpoint is not None
    if name is not None and (Path(name).exists() or not resumes):
        adapter = SavedAdapter.of(name)
    source = look_at(parsed, adapter)
    if config.output.output_dir is not None:
        model = None if source is None else source.directory
        check_place(config, Path(config.output.output_dir), model)
    return RunRequest(parsed, config, rows, adapter)

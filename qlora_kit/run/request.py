"""What a run is asked to be, refused early: by what paths, headers and first rows show.

Nothing here needs torch, whose import takes longer than all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.base.checks import BaseFiles
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.run import QUICKSTART, RunConfig
from qlora_kit.data.lines import GivenRows
from qlora_kit.data.rows import Rows
from qlora_kit.options.parsed import Parsed, refuse_tokens
from qlora_kit.run.method import rows_of_run
from qlora_kit.run.metrics import check_plot, check_trackers
from qlora_kit.run.named_base import Named
from qlora_kit.run.place import check_place, check_resumed_place
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.sending import check_sending


@dataclass(frozen=True)
class RunRequest:
    """The options of a run as they were given, its rows, and the adapter that it goes on from.

    A run to resume may go on without the adapter that it started from: `adapter` is then None.
    `files` are those of the base, None where the adapter is yet to be asked for it.
    """

    parsed: Parsed
    config: RunConfig
    rows: Rows
    adapter: SavedAdapter | None
    files: BaseFiles | None

    @property
    def targets_given(self) -> bool:
        """Whether the linears to adapt were named."""
        return any("target_modules" in names for names in self.parsed.given.values())

    def files_of(self, base: BaseConfig) -> BaseFiles | None:
        """`files`, where they are those of `base`: a checkpoint may have named another one."""
        asked = self.config.base
        is_same = (asked.model, asked.revision) == (base.model, base.revision)
        return self.files if is_same else None


def read_request(parsed: Parsed, given: Mapping[str, GivenRows] | None = None) -> RunRequest:
    """Read what a run is asked to be; `given` has rows of the program, as for `load_rows`.

    Errors: those of the options, the rows, the adapter's and the base's files, of the directory
    where it is named, and of the hub where the adapter is to go there.
    """
    refuse_tokens(parsed)
    config = RunConfig.of(parsed)
    check_trackers(config.output.report_to)
    check_plot(config.output.plot, config.output.overwrite)
    check_resumed_place(config, unasked=parsed.config_file == str(QUICKSTART))
    config, rows = rows_of_run(config, given)
    name = config.lora.adapter
    if name is not None and config.output.resume_from_checkpoint is not None:
        name = name if Path(name).exists() else None
    named = Named.open(parsed, name, hashed=True)
    if config.output.output_dir is not None:
        model = None if named.files is None else named.files.source.directory
        check_place(config, Path(config.output.output_dir), model)
    check_sending(parsed, "adapter")
    return RunRequest(parsed, config, rows, named.adapter, named.files)

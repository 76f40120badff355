"""A run that was checked and is ready to begin: nothing of it was written, no weight was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.run import RunConfig
from qlora_kit.data.encode import EncodedRows
from qlora_kit.data.rows import Rows
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.plan.plan import MemoryPlan
from qlora_kit.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class PreparedRun:
    """A run whose options, files and shapes were checked, before a weight is read.

    `schedule` has all of its steps. `identity` tells the base and the encoded rows apart from
    others, whatever they are called.
    `start` is the directory of the adapter that the run goes on from, checked against the base.
    `memory` says what it will take, and which layers recompute. `names` are those that the
    directory may have where none was given.
    """

    config: RunConfig
    base: Base
    rows: Rows
    encoded: EncodedRows
    held_out: EncodedRows | None
    schedule: StepSchedule
    directory: Path
    identity: Mapping[str, str | None]
    resume: Checkpoint | None
    memory: MemoryPlan
    start: Path | None = None
    names: Iterator[Path] | None = None

"""The result of a finished run, read from what it left in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.json_file import read_json
from qlora_kit.errors import CheckpointError
from qlora_kit.lora.adapter_files import WEIGHTS_FILE
from qlora_kit.run.directory import RESULT
from qlora_kit.run.metrics import METRICS_FILE


@dataclass(frozen=True)
class RunResult:
    """What a run gave. Losses are in nats a supervised token; None where nothing was held out.

    `output_dir` is what `load_adapter`, PEFT and the other commands take, `adapter` the file of the
    weights in it. `history` has the numbers of each logged step. The bytes of memory are those of
    tensors by component, `peak` among them. `record` is all of `run.json`.
    """

    output_dir: Path
    adapter: Path
    steps: int
    loss_before: float | None
    loss_after: float | None
    history: tuple[Mapping[str, Any], ...]
    memory_planned: Mapping[str, int]
    memory_measured: Mapping[str, int]
    record: Mapping[str, Any]

    @staticmethod
    def read(directory: Path) -> RunResult:
        """The result in a run's directory. Errors: `CheckpointError` for a broken file."""
        record = read_json(directory / RESULT, CheckpointError)
        held_out, memory = record["eval"] or {}, record["memory"]
        lines = (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return RunResult(
            output_dir=directory,
            adapter=directory / WEIGHTS_FILE,
            steps=record["train"]["steps"],
            loss_before=held_out.get("loss_before"),
            loss_after=held_out.get("loss_after"),
            history=tuple(json.loads(line) for line in lines),
            memory_planned=memory.get("planned", {}),
            memory_measured=memory["measured"],
            record=record,
        )

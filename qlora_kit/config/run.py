"""All options of a training run: one of each group that `finetune` has.

In this folder every option is written once, with its default, help and check; how one is declared
stands in `options/option.py`. A check here needs no model: what needs one is made once the model's
headers are known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import HubConfig, OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.option import as_flat
from qlora_kit.options.parsed import Parsed

RUN_GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)
FINETUNE_GROUPS = (*RUN_GROUPS, HubConfig)
"""What `finetune` takes: where an adapter goes afterwards is no part of the run that made it."""
QUICKSTART = Path(__file__).resolve().parents[1] / "assets" / "quickstart.yaml"
"""The options of `finetune` where it is not told which run is meant."""


@dataclass(frozen=True)
class RunConfig:
    """What `finetune` runs: one of each group of options."""

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    @staticmethod
    def of(parsed: Parsed) -> RunConfig:
        """The options of a parsed command that has all groups of a run."""
        return RunConfig(*(parsed[group] for group in RUN_GROUPS))  # type: ignore[arg-type]

    def as_flat(self) -> dict[str, Any]:
        """`{option name: value}` of every option that applies, in the order of `--help`.

        An option that is left alone and has no value (None) is absent.
        """
        groups = vars(self).values()
        return {name: value for group in groups for name, value in as_flat(group).items()}

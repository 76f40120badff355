"""Every group of options that a command has."""

from __future__ import annotations

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ChatConfig, PlanConfig, ServeConfig, ShowConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.generation import (
    AdaptersConfig,
    EvaluateConfig,
    GenerateConfig,
    SamplingConfig,
)
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import HubConfig, OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.option import Options

RUN_GROUPS: tuple[type[Options], ...] = (
    BaseConfig,
    DataConfig,
    LoRAConfig,
    TrainingConfig,
    OutputConfig,
)
"""Those of a training run."""
OPTION_GROUPS = (
    *RUN_GROUPS,
    HubConfig,
    ExportConfig,
    AdaptersConfig,
    SamplingConfig,
    GenerateConfig,
    ChatConfig,
    EvaluateConfig,
    ShowConfig,
    PlanConfig,
    ServeConfig,
)

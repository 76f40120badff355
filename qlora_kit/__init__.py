"""qlora_kit: QLoRA fine-tuning on one graphics card. The names are resolved on first use."""

import importlib
from typing import Any

from qlora_kit.process.start import ready_for_torch

_HOMES = {
    "finetune": "library",
    "RunResult": "run.runs",
    "BaseConfig": "config.base",
    "DataConfig": "config.data",
    "LoRAConfig": "config.lora",
    "TrainingConfig": "config.training",
    "load_base": "base.load",
    "load_rows": "data.rows",
    "encode_rows": "data.encode",
    "StepSchedule": "data.schedule",
    "inject_lora": "lora.inject",
    "load_adapter": "lora.adapter",
    "save_adapter": "lora.adapter",
    "AdapterBank": "lora.bank",
    "export_model": "export.export",
    "from_peft": "export.peft_model",
    "to_peft": "export.peft_model",
    "make_optimizer": "training.optimizer",
    "plan_memory": "plan.plan_memory",
    "train": "training.loop",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_kit' has no attribute {name!r}")
    # Most of them import torch, whose threads read how to wait when it is loaded.
    with ready_for_torch():
        return getattr(importlib.import_module(f"qlora_kit.{_HOMES[name]}"), name)

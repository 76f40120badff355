"""The plan of a run from its options alone, in one call."""

from __future__ import annotations

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DEFAULT_LENGTH
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner


def plan_memory(
    base: BaseConfig | None = None,
    lora: LoRAConfig | None = None,
    training: TrainingConfig | None = None,
    *,
    length: int = DEFAULT_LENGTH,
    packing: bool = False,
    device: str | None = None,
    budget_bytes: int | None = None,
) -> MemoryPlan:
    """What a run of these options takes, with rows of `length` tokens that are all trained on.

    `base.model` may be a config.json alone; no weight is read. `device` (`cpu` or `cuda`) is that
    of `base` unless given, and need not be here. Without a budget `auto` keeps everything.
    Errors: `ConfigError`, `ModelError`, `UnsafeInputError`, `ResourceError`.
    """
    lora, training = lora or LoRAConfig(), training or TrainingConfig()
    planner = Planner(base or BaseConfig(), lora, training, device)
    shape = BatchShape(training.rows, length, length, packing)
    budget = training.budget_bytes if budget_bytes is None else budget_bytes
    return planner.plan(shape, budget_bytes=budget)

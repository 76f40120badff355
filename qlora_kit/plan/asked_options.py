"""What `plan` is asked for: options, the planner made of them, its budget, and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.lora.targets import auto_note
from qlora_kit.options.parsed import Parsed
from qlora_kit.plan.asked_device import asked_budget, asked_clock, asked_device, asked_host
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.micro_batch import fastest_rows
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.suggest import Options

NO_BF16 = (
    "{} has no units for bf16 and is far slower in it than is estimated here: fp16, which --dtype "
    "auto takes there, is what it multiplies"
)


@dataclass(frozen=True)
class Asked:
    """`notes` are those on the base and its card; `budget_bytes` is None where no card is known."""

    options: Options
    planner: Planner
    device: str
    budget_bytes: int | None
    notes: Sequence[str]


def asked_options(parsed: Parsed) -> Asked:
    """What the options ask for. Errors: `ConfigError`, and those of a `config.json`."""
    asked, base, lora = parsed[PlanConfig], parsed[BaseConfig], parsed[LoRAConfig]
    training, device = parsed[TrainingConfig], asked_device(base, asked)
    training.check_packing(asked.packing)
    clock = asked_clock(device, asked)
    if clock is not None and not clock.card.has_bf16 and base.dtype == "auto":
        base = replace(base, dtype="fp16")
    host = asked_host(device, asked)
    planner = Planner(base, lora, training, device, clock=clock, host_bytes=host)
    # Both groups have the option, and the first one of them is given it.
    data = replace(parsed[DataConfig], max_length=asked.max_length)
    length = data.length_in(planner.run.context)
    budget = asked_budget(device, training, asked)
    training = _in_micro_batches(planner, training, length, asked.packing, budget)
    notes = planner.notes
    if lora.target_modules == "auto" and (auto := auto_note(planner.model)):
        notes = (*notes, auto)
    if clock is not None and not clock.card.has_bf16 and base.dtype == "bf16":
        notes = (*notes, NO_BF16.format(clock.card.name))
    options = Options(base, lora, training, length, asked.packing)
    return Asked(options, planner, device, budget, notes)


def _in_micro_batches(
    planner: Planner, training: TrainingConfig, length: int, packing: bool, budget: int | None
) -> TrainingConfig:
    """The same steps with the rows of a micro-batch, where they are left to the plan."""
    if training.batch_size is not None or planner.clock is None:
        return training.in_micro_batches_of(training.rows)

    def plan_of(rows: int) -> MemoryPlan:
        shape, steps = BatchShape(rows, length, length, packing), training.step_rows // rows
        return planner.plan(shape, budget_bytes=budget, micro_steps=steps)

    def seconds_of(rows: int, plan: MemoryPlan) -> float:
        assert plan.time is not None
        return plan.time.total_s

    return training.in_micro_batches_of(fastest_rows(training.step_rows, plan_of, seconds_of))

"""The answer to what `plan` is asked."""

from __future__ import annotations

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed
from qlora_kit.plan.answer import Answer
from qlora_kit.plan.asked_options import Asked, asked_options
from qlora_kit.plan.grid import grid_of
from qlora_kit.plan.longest import Longest, longest_at_all_levels
from qlora_kit.plan.memory_plan import MemoryPlan, note_of_host
from qlora_kit.plan.quantization_error import check_errors, quantization_errors
from qlora_kit.plan.suggest import suggest


def answer(parsed: Parsed) -> Answer:
    """Plan what the options ask for. Errors: `ConfigError`, and those of a `config.json`."""
    shown = parsed[PlanConfig]
    if shown.quantization_error:
        check_errors(parsed[BaseConfig])
    asked = asked_options(parsed)
    options, planner, budget = asked.options, asked.planner, asked.budget_bytes
    steps = options.training.gradient_accumulation_steps
    plan = planner.plan(options.largest, budget_bytes=budget, micro_steps=steps)
    fits = plan.fits or budget is None
    on_host = note_of_host(plan)
    return Answer(
        options,
        planner.overhead.source,
        plan,
        suggestions=[]
        if fits or budget is None
        else suggest(options, planner, asked.device, budget),
        grid=grid_of(planner, options, budget) if shown.grid else None,
        notes=asked.notes if on_host is None else (*asked.notes, on_host),
        errors=quantization_errors(parsed[BaseConfig]) if shown.quantization_error else None,
        left=planner.left,
        in_16_bits=planner.in_16_bits,
        hours=_hours(plan, options.training, shown),
        longest=_longest(asked) if shown.longest else None,
    )


def _longest(asked: Asked) -> list[Longest]:
    """The longest rows that fit. Errors: `ConfigError` where no budget says into what."""
    if asked.budget_bytes is None:
        raise ConfigError(
            "longest true: rows may be of any length where no memory is given",
            "name a card, such as --card rtx3060, or give --device_memory",
        )
    options, steps = asked.options, asked.options.training.gradient_accumulation_steps
    found = longest_at_all_levels(asked.planner, options.largest, asked.budget_bytes, steps)
    return list(found)


def _hours(plan: MemoryPlan, training: TrainingConfig, asked: PlanConfig) -> float | None:
    """Of a run's steps: as many as are asked for, or as the data set gives."""
    if plan.time is None:
        return None
    epochs, seconds = training.num_train_epochs, None
    if training.max_steps is not None:
        seconds = training.max_steps * plan.time.total_s
    elif asked.rows is not None:
        seconds = epochs * asked.rows / training.step_rows * plan.time.total_s
    elif asked.tokens is not None:
        seconds = epochs * asked.tokens / plan.time.tokens_per_s
    return None if seconds is None else seconds / 3600

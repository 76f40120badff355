"""The memory plan of a training run: of its largest batch, on its device, within what is free."""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.base.base import Base
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import DEFAULT_BITS
from qlora_kit.config.run import RunConfig
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.device.found import available_bytes
from qlora_kit.errors import ConfigError
from qlora_kit.memory.counter import weight_bytes
from qlora_kit.plan.memory_plan import MemoryPlan, note_of_host
from qlora_kit.run.plans import RunPlans


def planned_run(
    config: RunConfig, base: Base, schedule: StepSchedule, rank: int
) -> tuple[StepSchedule, MemoryPlan]:
    """The plan of a run within its budget, or within what its device has free.

    It comes with the run's steps, in the micro-batches that were planned.

    Errors: `ConfigError` for a `--memory_budget` that `auto` cannot keep.
    """
    training = config.training
    budget = training.budget_bytes
    plans = RunPlans(config, base, schedule, rank)
    room = budget or available_bytes(base.device)
    if training.batch_size is None:
        plans.take_fastest(room)
    plan = plans.within(room)
    plan = replace(plan, host_note=note_of_host(plan))
    if not plan.fits:
        plan = replace(plan, fitting_length=plans.fitting_length(plan))
    if budget is not None and plan.missing_bytes and training.gradient_checkpointing == "auto":
        margin = f" and a margin of {plan.margin_bytes}" if plan.margin_bytes else ""
        lower = [plan.lower_length]
        lower += ["--batch_size"] if training.rows > 1 else []
        lower += (
            ["--bits"] if base.quantization.bits > DEFAULT_BITS and not base.form.stored else []
        )
        raise ConfigError(
            f"memory_budget {training.memory_budget} is {plan.missing_bytes} bytes below what the "
            f"run takes with everything recomputed (peak of {plan.peak_bytes} in {plan.place}"
            f"{margin})",
            f"raise it by that, or lower {' or '.join(lower)}; "
            "`qlora-kit plan` with the same options names what would fit",
        )
    return plans.schedule, plan


def measured_bits(config: RunConfig) -> dict[int, dict[str, int]]:
    """Load the base in 16, 8 and 4 bits one after another; bytes by component of each."""
    measured, base = {}, config.base
    for bits in (16, 8, 4):
        skip, head = (None, 16) if bits == 16 else (base.skip_modules, base.head_bits)
        other = replace(
            base, bits=bits, quant_type=None, double_quant=None, skip_modules=skip, head_bits=head
        )
        kept = replace(other, base_cache=base.base_cache and bits == base.bits)
        measured[bits] = weight_bytes(read_weights(open_base(kept)))
    return measured

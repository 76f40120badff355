"""`qlora-kit plan`: what a run will take, by component, before a byte of weights is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.option import size_bytes

if TYPE_CHECKING:
    from qlora_kit.plan.plan import MemoryPlan, Planner
    from qlora_kit.plan.suggest import Options, Suggestion

SUMMARY = (
    "Say what a run will take, by component, before a byte of weights is read or downloaded; of a "
    "model that is not here config.json is fetched. The exit code is 0 whether or not it fits: "
    "--json says so under `fits`."
)
GROUPS = (BaseConfig, LoRAConfig, TrainingConfig, PlanConfig)
ROWS, LONGEST, PARTS = (1, 2, 4, 8), 4096, (8, 4, 2, 1)
"""Of the table that `--grid` makes: its lengths are parts of the longest, or of the context."""


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit plan", SUMMARY, GROUPS, argv, beside=(DataConfig, OutputConfig))
    asked = parsed[PlanConfig]
    given = parsed.given[LoRAConfig]
    if "adapter" in given and not given >= {"r", "target_modules"}:
        raise ConfigError(
            f"--adapter {parsed[LoRAConfig].adapter}: a plan does not read adapters",
            "give its --lora_r and --target_modules too, or --config with its run's config.yaml",
        )
    from qlora_kit.base.checks import find_config, read_config_file

    # What is not here, or cannot be planned, is refused before torch is imported.
    read_config_file(find_config(parsed[BaseConfig].model, parsed[BaseConfig].revision)[1])
    from qlora_kit.plan.plan import Planner
    from qlora_kit.plan.suggest import Options, suggest

    base, lora, training = parsed[BaseConfig], parsed[LoRAConfig], parsed[TrainingConfig]
    device = _device(base, asked)
    planner = Planner(base, lora, training, device, margin=True)
    # Both groups have the option, and the first one of them is given it.
    data = replace(parsed[DataConfig], max_length=asked.max_length)
    length = data.length_in(planner.run.context)
    options = Options(base, lora, training, length, asked.packing)
    budget = _budget(device, training, asked)
    plan = planner.plan(options.largest, budget_bytes=budget)
    suggestions = [] if plan.fits or budget is None else suggest(options, planner, device, budget)
    grid = _grid(planner, options, budget) if asked.grid else None
    if asked.json:
        from qlora_kit.commands.terminal import Terminal

        Terminal().json(_as_json(plan, suggestions, grid))
    else:
        from qlora_kit.commands.plan_text import print_plan

        print_plan(options, planner, plan, suggestions, grid)
    return 0


def _device(base: BaseConfig, asked: PlanConfig) -> str:
    """The kind of device that is planned for: a card's memory is that of a GPU."""
    if base.device != "auto":
        return base.device.partition(":")[0]
    if asked.device_memory is not None:
        return "cuda"
    from qlora_kit.base.load import find_device

    return find_device("auto").type


def _budget(device: str, training: TrainingConfig, asked: PlanConfig) -> int | None:
    """What the run may take: what is given, the smaller of both; else what this device has free."""
    given = [size_bytes(one) for one in (training.memory_budget, asked.device_memory) if one]
    if given:
        return min(given)
    import torch

    from qlora_kit.run.planned import available_bytes

    here = device == "cpu" or torch.cuda.is_available()
    return available_bytes(torch.device(device)) if here else None


def _grid(planner: Planner, options: Options, budget: int | None) -> list[dict[str, Any]]:
    """The plans of batches and lengths, up to the model's context."""
    from qlora_kit.plan.plan import BatchShape

    cells, longest = [], min(LONGEST, planner.run.context)
    for length in (longest // part for part in PARTS):
        for rows in ROWS:
            shape = BatchShape(rows, length, length, options.packing)
            plan = planner.plan(shape, budget_bytes=budget)
            cells.append({"batch_size": rows, "max_length": length, "plan": plan})
    return cells


def _as_json(
    plan: MemoryPlan, suggestions: Sequence[Suggestion], grid: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    result = plan.as_json()
    result["suggestions"] = [
        {"change": one.change, "peak_bytes": one.plan.peak_bytes} for one in suggestions
    ]
    if grid is not None:
        result["grid"] = [
            {
                "batch_size": cell["batch_size"],
                "max_length": cell["max_length"],
                "peak_bytes": cell["plan"].peak_bytes,
                "gradient_checkpointing": cell["plan"].recompute,
                "fits": cell["plan"].fits,
            }
            for cell in grid
        ]
    return result

"""`qlora-kit plan`: what a run will take, by component, before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.plan_text import print_plan
from qlora_kit.commands.progress import working
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import HubConfig, OutputConfig
from qlora_kit.config.training import TrainingConfig

SUMMARY = (
    "Say what a run will take, by component, before a byte of weights is read or downloaded; of a "
    "model that is not here config.json is fetched. The exit code is 0 whether or not it fits: "
    "--json says so under `fits`."
)
GROUPS = (BaseConfig, LoRAConfig, TrainingConfig, PlanConfig)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    beside = (DataConfig, OutputConfig, HubConfig)
    parsed = parse("qlora-kit plan", SUMMARY, GROUPS, argv, beside=beside)
    from qlora_kit.plan.ask import plan_for

    terminal = Terminal()
    with working(terminal, "planning"):
        answer = plan_for(parsed)
    if parsed[PlanConfig].json:
        terminal.json(answer.as_json())
    else:
        print_plan(answer, terminal)
    return 0

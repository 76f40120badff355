"""What `plan` is asked, refused where it cannot be planned before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.base.checks import find_config, read_config_file
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.cards import find_card
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed

if TYPE_CHECKING:
    from qlora_kit.plan.answer import Answer


def plan_for(parsed: Parsed) -> Answer:
    """The plan that the options ask for. Errors: `ConfigError`, and those of a `config.json`."""
    base, given = parsed[BaseConfig], parsed.given[LoRAConfig]
    if "adapter" in given and not given >= {"r", "target_modules"}:
        raise ConfigError(
            f"--adapter {parsed[LoRAConfig].adapter}: a plan does not read adapters",
            "give its --lora_r and --target_modules too, or --config with its run's config.yaml",
        )
    if (name := parsed[PlanConfig].card) is not None:
        card = find_card(name)
        if base.device == "cpu":
            raise ConfigError(
                f"--card {card.name} is planned beside --device cpu", "leave one of them out"
            )
    read_config_file(find_config(base.model, base.revision)[1])
    from qlora_kit.plan.asked_plan import answer

    return answer(parsed)

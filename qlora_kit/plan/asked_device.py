"""The device that `plan` is asked for: its kind, the card, and the memory that a run may take."""

from __future__ import annotations

import torch

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.cards import find_card
from qlora_kit.device.found import available_bytes, card_of, find_device, free_bytes, has_card
from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import size_bytes
from qlora_kit.plan.step_time import Clock


def asked_device(base: BaseConfig, asked: PlanConfig) -> str:
    """The kind of device that is planned for: a card's memory is that of a GPU.

    Where a card here is meant it is torch's current one from here on, whose memory is then asked.
    Errors: `ResourceError` where it is not here.
    """
    is_card = asked.device_memory is not None or asked.card is not None
    if base.device != "auto":
        kind = base.device.partition(":")[0]
        if not is_card and has_card():
            find_device(base.device)
        return kind
    return "cuda" if is_card else find_device("auto").type


def asked_clock(device: str, asked: PlanConfig) -> Clock | None:
    """Times on the card that is named; else on the one here, unless other memory is planned for.

    Errors: `ConfigError` for hours of a run where no card is known.
    """
    card = None
    if asked.card is not None:
        card = find_card(asked.card)
    elif asked.device_memory is None:
        card = card_of(torch.device(device))
    for name in ("rows", "tokens"):
        if card is None and (count := getattr(asked, name)) is not None:
            raise ConfigError(
                f"{name} {count}: hours are estimated for a card whose speed is known",
                "name it, such as --card rtx3060",
            )
    return None if card is None else Clock(card)


def asked_budget(device: str, training: TrainingConfig, asked: PlanConfig) -> int | None:
    """What the run may take: the smallest of what is given; else what this device has free."""
    given = [size_bytes(one) for one in (training.memory_budget, asked.device_memory) if one]
    if asked.card is not None:
        given.append(find_card(asked.card).memory_bytes)
    if given:
        return min(given)
    here = device == "cpu" or has_card()
    return available_bytes(torch.device(device)) if here else None


def asked_host(device: str, asked: PlanConfig) -> int | None:
    """What the host has free, where that is this machine, with its card if it is one; else None."""
    given = asked.device_memory
    if device == "cpu":
        return size_bytes(given) if given else free_bytes(torch.device("cpu"))
    if given is not None or not has_card():
        return None
    if asked.card is not None and card_of(torch.device(device)) != find_card(asked.card):
        return None
    return free_bytes(torch.device("cpu"))

"""Optimizers by name, and learning-rate schedules.

`adamw` is torch's fused one, with fp32 states. The others are bitsandbytes': 8-bit states, and
paged ones whose states move to host memory when the GPU is full. Paging needs CUDA; where it does
not exist, or would page nothing, `paging_note` says so. With quantize.py, the only module that
imports bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from qlora_kit.config import TrainingConfig

PAGED_FROM_ELEMENTS = 100_000
"""bitsandbytes 0.50 pages the state of a parameter only from this size on."""


def optimizer_name(name: str, device: torch.device) -> str:
    """What `auto` stands for on this device; any other name unchanged."""
    if name != "auto":
        return name
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw"


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer of that name (one of `config.OPTIMIZERS`) over the trainable `parameters`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay, fused=True)
    import bitsandbytes.optim as bnb

    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
        "lion_8bit": bnb.Lion8bit,
        "paged_lion_8bit": bnb.PagedLion8bit,
    }
    if name.startswith("paged") and trained[0].device.type != "cuda":
        # The same arithmetic without the paging, which would only warn and do nothing here.
        classes["paged_adamw_8bit"], classes["paged_lion_8bit"] = bnb.AdamW8bit, bnb.Lion8bit
        classes["paged_adamw_32bit"] = bnb.AdamW32bit
    optimizer: torch.optim.Optimizer = classes[name](
        trained, lr=learning_rate, weight_decay=weight_decay
    )
    return optimizer


def paging_note(name: str, parameters: Iterable[nn.Parameter], device: torch.device) -> str | None:
    """One sentence where a paged optimizer pages nothing, else None."""
    if not name.startswith("paged"):
        return None
    if device.type != "cuda":
        return f"{name}: paging needs CUDA; on {device.type} its states stay in ordinary memory"
    largest = max((p.numel() for p in parameters if p.requires_grad), default=0)
    if largest < PAGED_FROM_ELEMENTS:
        return (
            f"{name} pages nothing here: a state is paged from {PAGED_FROM_ELEMENTS} elements on, "
            f"and the largest adapter matrix has {largest}"
        )
    return None


def warmup_steps(config: TrainingConfig, num_steps: int) -> int:
    """Whole steps of warm-up; a value below 1 is a share of all steps."""
    if config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * num_steps)
    return round(config.warmup_steps)


def learning_rates(config: TrainingConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1 ... num_steps: linear warm-up, then the schedule down to 0.

    The last step of cosine and linear still trains: 0 would be reached one step after it.
    """
    warmup = warmup_steps(config, num_steps)

    def at(step: int) -> float:
        if step <= warmup:
            return config.learning_rate * step / warmup
        if config.lr_scheduler_type == "constant":
            return config.learning_rate
        done = (step - 1 - warmup) / max(1, num_steps - warmup)
        if config.lr_scheduler_type == "linear":
            return config.learning_rate * max(0.0, 1 - done)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return at

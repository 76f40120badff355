"""Linears whose weights are on their device only at times (`stream.py`), for whoever reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Streamed:
    """What a module has as `streamed` whose tensors come and go: `device` is where to.

    `load` brings them there; they stay until another layer than theirs is asked for. `blocks` is
    all the memory that such tensors of a model lie in, on the device and, in the process, beside.
    """

    device: torch.device
    load: Callable[[], None]
    blocks: tuple[Tensor, ...]


def make_resident(module: nn.Module) -> None:
    """Have a module's frozen tensors on its device; they are in any model that is not streamed."""
    if (streamed := streamed_of(module)) is not None:
        streamed.load()


def device_of(linear: nn.Linear) -> torch.device:
    """The device that a linear computes on."""
    streamed = streamed_of(linear)
    return linear.weight.device if streamed is None else streamed.device


def streamed_of(module: nn.Module) -> Streamed | None:
    """How a module's tensors come and go; None where they stay."""
    return vars(module).get("streamed")

"""Limits on the numbers of tensors that lie on a device, looked at together.

Each look makes the host wait for all that the device was given. Loading has hundreds of tensors, so
it notes their extremes on the device, and reads them once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.device.target import has_values
from qlora_kit.errors import NumericError

FINITE = sys.float_info.max
"""The limit of what need only be finite."""


class NumberChecks:
    """Notes tensors and their limits; `read` raises for the first that is beyond its own."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []
        self._limits: list[tuple[float, Callable[[float], NumericError]]] = []

    def add(self, tensor: Tensor, limit: float, error: Callable[[float], NumericError]) -> None:
        """A tensor of which no value may be above `limit` by its size, or NaN.

        `error` is made of the largest size that it has. The tensor may change after the call.
        """
        # A NaN is both of the extremes.
        self._extremes.append(torch.stack(torch.aminmax(tensor)).double())
        self._limits.append((limit, error))

    def read(self) -> None:
        """Look at all of them, in one transfer. Errors: `NumericError`."""
        if not self._extremes or not has_values(self._extremes[0]):
            return
        found = torch.stack(self._extremes).tolist()
        for (low, high), (limit, error) in zip(found, self._limits, strict=True):
            if not (-limit <= low and high <= limit):
                raise error(max(-low, high))

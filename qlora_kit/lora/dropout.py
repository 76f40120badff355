"""Dropout that draws the same mask whenever it is asked for the same place of a run."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class KeyedDropout(nn.Module):
    """Dropout whose mask follows from seed, layer, step and micro-step alone.

    Recomputing a layer, or a step that is tried again, draws the same mask without any saved
    random state. The training loop calls `seek` on whatever has it.
    """

    def __init__(self, p: float, seed: int, layer_name: str) -> None:
        super().__init__()
        self.p = p
        self._key = f"{seed} {layer_name}"
        self._position = (0, 0)

    def seek(self, step: int, micro_step: int) -> None:
        """Say where the run stands; masks drawn from here on belong to that place."""
        self._position = (step, micro_step)

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of `x` and scale up the rest; the identity in evaluation mode."""
        return self.at(self.position, x)

    @property
    def position(self) -> tuple[int, int] | None:
        """Where masks are drawn for now; None where nothing is dropped."""
        return self._position if self.training and self.p else None

    def at(self, position: tuple[int, int] | None, x: Tensor) -> Tensor:
        """Drop out `x`, or its gradient of the same shape, with the mask of a `position`."""
        if position is None:
            return x
        step, micro_step = position
        digest = hashlib.sha256(f"{self._key} {step} {micro_step}".encode()).digest()
        generator = torch.Generator(device=x.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p, generator=generator)
        return x * keep * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}"

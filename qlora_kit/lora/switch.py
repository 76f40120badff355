"""What takes part beside the base: one reference, which all adapted linears of a model read.

A switch sets this reference and nothing else. So its cost grows neither with the adapted linears
nor with the adapters, it moves and allocates nothing, and there is no moment in which some layers
have one adapter and some another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from qlora_kit.lora.low_rank import Part


class Active(Protocol):
    """One adapter, or those of the rows of a batch."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def part(self, layer: nn.Module) -> Part | None:
        """What an adapted linear computes with; None where the base alone does."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """An `Active` that has what each adapted linear computes with at hand."""

    name: str
    parts: Mapping[nn.Module, Part]

    def part(self, layer: nn.Module) -> Part | None:
        """What an adapted linear computes with; None where the base alone does."""
        return self.parts.get(layer)


@dataclass
class Switch:
    """The reference of one model; None is the base alone.

    It is `left` where no layer of the model reads it any more.
    """

    active: Active | None = None
    left: bool = False

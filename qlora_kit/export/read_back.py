"""How an export is read from disk again, where the device already holds the model as trained.

A card that has room for a model in 4 bits need not have room for a second one in 16. So the export
is read whole beside it where both fit, else layer by layer (`base/layer_by_layer.py`), on the
device, or on the host where not even that fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_kit.base.layer_by_layer import layer_by_layer, layer_bytes
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig

BESIDE = 1.1
"""What a model takes while it runs, in weights of its own: activations of a batch beside them. An
allowance: where it is too small the next way is tried."""


@dataclass(frozen=True)
class Way:
    """How an export is read to be compared: on which device, and whether whole."""

    device: torch.device
    whole: bool

    def __str__(self) -> str:
        place = "the host" if self.device.type == "cpu" else str(self.device)
        return f"{'whole' if self.whole else 'layer by layer'}, on {place}"


def ways(directory: Path, dtype: str, device: torch.device, free: int) -> Iterator[Way]:
    """The ways that have room, the fastest first, where `device` has `free` bytes left.

    The last is tried without asking.
    """
    cpu = torch.device("cpu")
    opened = open_base(_options(directory, dtype, cpu))
    around, largest = layer_bytes(opened)
    whole = sum(entry.end - entry.start for entry in opened.plain.values())
    if free >= BESIDE * whole:
        yield Way(device, True)
    if device != cpu and free >= BESIDE * (around + largest):
        yield Way(device, False)
    yield Way(cpu, False)


@contextlib.contextmanager
def read_back(directory: Path, dtype: str, way: Way) -> Iterator[PreTrainedModel]:
    """The exported model on a device, whole or layer by layer."""
    if way.whole:
        yield load_base(str(directory), bits=16, dtype=dtype, device=str(way.device)).model
        return
    with layer_by_layer(open_base(_options(directory, dtype, way.device))) as model:
        yield model


def _options(directory: Path, dtype: str, device: torch.device) -> BaseConfig:
    return BaseConfig(str(directory), bits=16, dtype=dtype, device=str(device))

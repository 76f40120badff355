"""How an export is read from disk again, where the device already holds the model as trained.

A card that has room for a model in 4 bits need not have room for a second one in 16. So the export
is read whole beside it, by transformers, where both fit, else layer by layer by our own reader
(`base/layer_by_layer.py`), on the device, or on the host where not even that fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_kit.base.json_file import read_json
from qlora_kit.base.layer_by_layer import layer_by_layer, layer_bytes
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.target import dtype_name

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


def ways(directory: Path, device: torch.device, free: int) -> Iterator[Way]:
    """The ways that have room, the fastest first, where `device` has `free` bytes left.

    The last is tried without asking.
    """
    cpu = torch.device("cpu")
    opened = open_base(_options(directory, cpu))
    around, largest = layer_bytes(opened)
    whole = sum(entry.end - entry.start for entry in opened.plain.values())
    whole += 0 if opened.wrapper is None else opened.wrapper.left_bytes
    if free >= BESIDE * whole:
        yield Way(device, True)
    if device != cpu and free >= BESIDE * (around + largest):
        yield Way(device, False)
    yield Way(cpu, False)


@contextlib.contextmanager
def read_layers(directory: Path, way: Way) -> Iterator[PreTrainedModel]:
    """The exported model on a device, layer by layer."""
    with layer_by_layer(open_base(_options(directory, way.device))) as model:
        yield model


def _options(directory: Path, device: torch.device) -> BaseConfig:
    """The options of a base that is an export, in the dtype that its config.json names."""
    config = read_json(directory / "config.json")
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])
    return BaseConfig(str(directory), bits=16, dtype=dtype_name(dtype), device=str(device))

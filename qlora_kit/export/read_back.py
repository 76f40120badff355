"""How an export is read from disk again, where the device already holds the model as trained.

A card that has room for a model in 4 bits need not have room for a second one in 16. So the export
is read whole beside it, by transformers, where both fit, else layer by layer by our own reader
(`base/layer_by_layer.py`), on the device, or on the host where not even that fits. The host's
memory is others' too: there no large model is read whole, however much is free. One that is
quantized, or has its adapter beside it, is always read whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_kit.base.json_file import read_json
from qlora_kit.base.layer_by_layer import layer_by_layer, layer_bytes
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.target import dtype_name
from qlora_kit.export.adapter_files import FOLDER
from qlora_kit.lora.adapter import load_adapter

BESIDE = 1.1
"""What a model takes while it runs, in weights of its own: activations of a batch beside them. An
allowance: where it is too small the next way is tried."""

ON_HOST = 2**30
"""What an export may take of the host beside what is loaded, but for its largest tensor: a 7 B in
16 bits would take 13.5 GB, layer by layer it takes one layer, embedding and head."""


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
    if opened.quantization.bits < 16 or (directory / FOLDER).is_dir():
        size = sum(entry.end - entry.start for entry in opened.entries.values())
        if device != cpu and free >= BESIDE * size:
            yield Way(device, True)
        yield Way(cpu, True)
        return
    around, largest = layer_bytes(opened)
    whole = sum(entry.end - entry.start for entry in opened.plain.values())
    whole += 0 if opened.wrapper is None else opened.wrapper.left_bytes
    if free >= BESIDE * whole and (device != cpu or BESIDE * whole <= ON_HOST):
        yield Way(device, True)
    if device != cpu and free >= BESIDE * (around + largest):
        yield Way(device, False)
    yield Way(cpu, False)


def with_adapter(model: PreTrainedModel, directory: Path, way: Way) -> PreTrainedModel:
    """The model that was read from `directory`, with the adapter that lies beside it there."""
    if (directory / FOLDER).is_dir():
        base = replace(open_base(_options(directory, way.device)), model=model)
        load_adapter(base, directory / FOLDER)
    return model


def read_layers(directory: Path, way: Way) -> AbstractContextManager[PreTrainedModel]:
    """The exported model on a device, layer by layer."""
    return layer_by_layer(open_base(_options(directory, way.device)))


def _options(directory: Path, device: torch.device) -> BaseConfig:
    """The options of a base that is an export, in the dtype that its config.json names."""
    config = read_json(directory / "config.json")
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])
    bits = None if "quantization_config" in config else 16
    return BaseConfig(str(directory), bits=bits, dtype=dtype_name(dtype), device=str(device))

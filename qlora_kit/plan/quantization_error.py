"""How far each linear is from itself once it is quantized, read off the weights, one at a time.

The error of a linear is ||W - Q(W)|| / ||W|| (Frobenius), with W as the files have it and Q(W) as
training multiplies by it: cast to the compute dtype, quantized, dequantized to that dtype. It says
which layers 4 bits hurt most, and not by how much the model's answers change: that is measured by
`evaluate --bits 4` and `--bits 16`. Memory holds one tensor with its buffer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.config_only import open_shape
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.tagged import quantized_tensors
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.found import compute_dtype, find_device, has_card
from qlora_kit.device.target import dtype_name
from qlora_kit.errors import ConfigError

AT_ONCE = 2**22
"""Elements that are compared at a time."""
WORST = (1, 5, 10, 20)
"""How many of the worst linears `--skip_modules` is counted for."""


@dataclass(frozen=True)
class LinearError:
    """The relative error of one linear, and its bytes in the compute dtype and quantized."""

    name: str
    error: float
    bytes_unquantized: int
    bytes_quantized: int

    @property
    def kind(self) -> str:
        """Which projection of its layer it is."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Kind:
    """The errors of all linears of one name: their median, and the largest with its linear."""

    name: str
    count: int
    median: float
    worst: LinearError


@dataclass(frozen=True)
class QuantizationErrors:
    """Every linear that is quantized, the worst first; `quantization` and `dtype` are the run's."""

    quantization: Quantization
    dtype: str
    linears: Sequence[LinearError]

    @property
    def kinds(self) -> list[Kind]:
        """One a kind of projection, the worst median first."""
        by_name: dict[str, list[LinearError]] = {}
        for one in self.linears:
            by_name.setdefault(one.kind, []).append(one)
        made = [
            Kind(name, len(found), statistics.median(one.error for one in found), found[0])
            for name, found in by_name.items()
        ]
        return sorted(made, key=lambda kind: -kind.median)

    @property
    def skips(self) -> list[tuple[Sequence[LinearError], int]]:
        """The worst ones, and the bytes that it takes not to quantize them."""
        found = []
        for count in WORST:
            if count <= len(self.linears):
                chosen = self.linears[:count]
                added = sum(one.bytes_unquantized - one.bytes_quantized for one in chosen)
                found.append((chosen, added))
        return found

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "bits": self.quantization.bits,
            "quant_type": self.quantization.quant_type,
            "double_quant": self.quantization.double_quant,
            "dtype": self.dtype,
            "linears": [asdict(one) for one in self.linears],
            "kinds": [asdict(kind) | {"worst": kind.worst.name} for kind in self.kinds],
            "skip_modules": [
                {"names": [one.name for one in chosen], "added_bytes": added}
                for chosen, added in self.skips
            ],
        }


def check_errors(config: BaseConfig) -> None:
    """Refuse what has no error of quantizing. Errors: `ConfigError`."""
    if config.bits == 16:
        raise ConfigError(
            "--quantization_error: in 16 bits nothing is quantized", "give --bits 4 or --bits 8"
        )


def quantization_errors(config: BaseConfig) -> QuantizationErrors:
    """Quantize every linear of the weights of `config`, one by one, and compare.

    On the GPU where there is one and `--device` allows it. Errors: `ConfigError` where the weights
    are not here or already quantized, those of the files, `NumericError`.
    """
    check_errors(config)
    device = find_device(config.device if has_card() else "cpu")
    base = open_shape(config, device)
    names = {
        f"{name}.weight": name
        for name in decoder_linears(base.model)
        if name not in base.form.skipped
    }
    entries = {key: base.entries[key] for key in names if key in base.entries}
    if not all(entry.path.suffix == ".safetensors" for entry in entries.values()):
        raise ConfigError(
            f"--quantization_error: {base.source.directory} has no weights, or has them quantized "
            "already",
            "give a directory with the original weights",
        )
    dtype = compute_dtype(config.dtype, device)
    found = []
    scaled = base.form.scaled
    for key, numbers in read_numbers(entries, scaled, torch.float32, device):
        error, size = _error(numbers.to(device), base.quantization, dtype, names[key])
        found.append(LinearError(names[key], error, numbers.numel() * dtype.itemsize, size))
    found.sort(key=lambda one: (-one.error, one.name))
    return QuantizationErrors(base.quantization, dtype_name(dtype), found)


def _error(
    numbers: Tensor, quantization: Quantization, dtype: torch.dtype, name: str
) -> tuple[float, int]:
    """The relative error of a weight (out, in), and its bytes once quantized."""
    layer = quantize_linear(numbers.to(dtype), None, quantization, name=name)
    size = sum(one.numel() * one.element_size() for one in quantized_tensors(layer))
    away = whole = 0.0
    for mine, theirs in _pieces(numbers, layer.dequantize(dtype)):
        away += float((mine - theirs).square_().sum(dtype=torch.float64))
        whole += float(mine.square().sum(dtype=torch.float64))
    return (math.sqrt(away / whole) if whole else 0.0), size


def _pieces(numbers: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in fp32, some rows at a time."""
    rows = max(1, AT_ONCE // numbers.shape[1])
    for start in range(0, len(numbers), rows):
        yield numbers[start : start + rows].float(), others[start : start + rows].float()

"""Quantizing on fake tensors, once for each shape.

Linears of one shape and dtype are quantized by the same operations, which allocate the same tensors
whatever else is there. So the first linear of a shape is traced. For each further one its result is
allocated at once, and the interval of the first is noted again, moved to what is there by then (as
`plan/extrapolate.py` does with layers). A large base has hundreds of linears and a handful of
shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.linear import QuantizedLinear, quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.tagged import shared_tables
from qlora_kit.memory.counter import Interval, StorageCounter
from qlora_kit.plan.extrapolate import moved


class RepeatedQuantize:
    """`quantize_linear` for a `counter`; components that lie `apart` are in no sum."""

    def __init__(self, counter: StorageCounter, apart: Collection[str]) -> None:
        self._counter, self._apart = counter, apart
        self._known: dict[Any, tuple[QuantizedLinear, Interval]] = {}

    def __call__(
        self, weight: Tensor, bias: Tensor | None, quantization: Quantization, **names: Any
    ) -> QuantizedLinear:
        """A layer as `quantize_linear` gives it, with fake tensors of its own."""
        phase = self._counter.intervals[-1].phase
        key = weight.shape, weight.dtype, quantization
        if key not in self._known:
            self._counter.at(phase)
            layer = quantize_linear(weight, bias, quantization, **names)
            self._counter.at(phase)
            self._known[key] = layer, self._counter.intervals[-2]
            return layer
        first, interval = self._known[key]
        before = dict(self._counter.sizes)
        layer = _like(first)
        self._counter.at(phase)
        self._counter.intervals[-1] = moved(interval, "", before, self._apart)
        self._counter.at(phase)
        return layer


def _like(layer: QuantizedLinear) -> QuantizedLinear:
    """A layer with new tensors like those of `layer`; a table that layers share is shared."""
    made, shared = copy.copy(layer), {id(table) for table in shared_tables(layer)}

    def new(tensor: Tensor | None) -> Tensor | None:
        keep = tensor is None or id(tensor) in shared
        return tensor if keep else torch.empty_like(tensor)  # type: ignore[arg-type]

    made._buffers = {name: new(buffer) for name, buffer in layer._buffers.items()}
    weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
    made._parameters = {"weight": weight, "bias": None}
    return made

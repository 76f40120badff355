"""The output head in 4 or 8 bits, decoded part by part, so that it is never whole in 16 bits.

A head of 128,256 tokens by 4,096 takes 1.05 GB in 16 bits, and 0.27 in 4. It has the formats of the
other linears (`linear.py`). Its rows are cut into tiles: each is a quantized linear of its own, a
view of the same bytes, and is multiplied like any other one, so that a device holds one decoded
tile. Whoever multiplies by the head calls it, or takes its `tiles` (`kernels/cross_entropy.py`).

A head that shares its weight with the embedding becomes a quantized copy: the embedding stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.base.form import in_bits
from qlora_kit.base.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlora_kit.base.meta_model import name_of_head, tied_names
from qlora_kit.base.quantize import NESTED_BLOCKSIZE, Quantization

TILE = 2**24
"""Entries of a tile, at most: 32 MiB in 16 bits, less than the largest linear of a 7 B model."""
ROWS = 2**13
"""Rows of a tile, at most, for who holds the logits of some tokens and a tile's beside them."""


class QuantizedHead(QuantizedLinear):
    """A quantized linear whose matmuls go over `tiles`: its rows, with the slices that they are.

    The packed weight and its scales are those of `layer`, which it takes the place of.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # The same dictionaries: a bias that is put here later is the layer's too.
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set
        # Not modules of this one: what they hold is counted, and named, once.
        vars(self)["layer"], vars(self)["tiles"] = layer, _tiles(layer)

    layer: QuantizedLinear
    tiles: list[tuple[slice, QuantizedLinear]]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out_features, in_features), a new tensor: for who writes it."""
        return self.layer.dequantize(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to (..., out_features), tile by tile."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for columns, tile in self.tiles:
            y[..., columns] = tile.matmul(x)
        return y if self.bias is None else y.add_(self.bias)

    def grad_input(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad` (..., out_features) to (..., in_features); the tiles are summed in fp32."""
        shape = *grad.shape[:-1], self.in_features
        found = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for columns, tile in self.tiles:
            found += tile.grad_input(grad[..., columns])
        return found.to(grad.dtype) if total is None else total.add_(found)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.layer.extra_repr()}, {len(self.tiles)} tiles"


@dataclass(frozen=True)
class HeadSource:
    """What the head of a base is quantized from: the tensor `made_of`, its own `weight` or shared.

    It is in the same format as the linears where its bits are theirs.
    """

    name: str
    weight: str
    made_of: str
    quantization: Quantization

    @staticmethod
    def of(model: Any, held: Quantization) -> HeadSource | None:
        """That of a `model` that is not filled yet, whose linears are `held` so.

        None where the head stays in 16 bits.
        """
        if held.head_bits == 16:
            return None
        name = name_of_head(model)
        weight = f"{name}.weight"
        made_of = tied_names(model).get(weight, weight)
        return HeadSource(name, weight, made_of, in_bits(held, held.head_bits))


def _tiles(layer: QuantizedLinear) -> list[tuple[slice, QuantizedLinear]]:
    """The rows of a layer in tiles of whole blocks of values and of scales, without its bias."""
    width, rows = layer.in_features, layer.out_features
    unit = 1
    if isinstance(layer, Linear4bit):
        block = BLOCKSIZE * (1 if layer.nested_absmax is None else NESTED_BLOCKSIZE)
        unit = block // math.gcd(block, width)
    step = max(1, min(ROWS, TILE // width) // unit) * unit
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    return [(part, _tile(layer, part)) for part in parts]


def _tile(layer: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """Some rows of a layer, of whole blocks unless they are the last: views of its tensors."""
    width, count = layer.in_features, rows.stop - rows.start
    if isinstance(layer, Linear8bit):
        scales = layer.row_absmax[rows]
        return Linear8bit(width, count, layer.weight.data[rows], None, row_absmax=scales)
    assert isinstance(layer, Linear4bit)
    first, end = rows.start * width, rows.stop * width

    def part(tensor: Tensor | None, entries: int) -> Any:
        """What of a tensor belongs to the rows, where `entries` of the weight share one of it."""
        return None if tensor is None else tensor[first // entries : -(-end // entries)]

    return Linear4bit(
        width,
        count,
        part(layer.weight.data, 2),
        None,
        quant_type=layer.quant_type,
        absmax=part(layer.absmax, BLOCKSIZE),
        nested_absmax=part(layer.nested_absmax, BLOCKSIZE * NESTED_BLOCKSIZE),
        nested_offset=layer.nested_offset,
        nested_map=layer.nested_map,
    )

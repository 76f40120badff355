"""A filled model that computes in fp32 with what it holds in 16 bits, or multiplies so.

Linears multiply part by part (`kernels/matmul.py`), and embeddings cast their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.embedding import embeddings
from qlora_kit.base.linear import QuantizedLinear, frozen_linear
from qlora_kit.base.placed_embedding import NarrowEmbedding, cast_no_rows, cast_rows
from qlora_kit.device.target import device_type, is_native


def compute_in(dtype: torch.dtype, model: Any) -> None:
    """Let a filled model compute in a `dtype` that what it holds may have fewer bits than."""
    for one in embeddings(model).values():
        if isinstance(one, nn.Embedding) and one.weight.dtype.itemsize < dtype.itemsize:
            cast_rows(dtype, one)
    multiply_in_fp32(dtype, model)


def hold_wide(base: Base) -> None:
    """Hold all of a base in the dtype that it computes in, as other programs expect of a model.

    Linears have the forward of their class again: a copy of one, as PEFT makes to train it, would
    go on with the weight that ours is bound to.
    """
    wide = {parameter for _, parameter in _narrow(base)}
    for parameter in wide:
        parameter.data = parameter.data.to(base.dtype)
    for module in base.model.modules():
        if isinstance(module, NarrowEmbedding):
            cast_no_rows(module)
        elif getattr(module, "weight", None) in wide:
            vars(module).pop("forward", None)


def hold_narrow(base: Base) -> None:
    """Hold in 16 bits again what `hold_wide` has widened, which loses nothing."""
    for name, parameter in _narrow(base):
        parameter.data = parameter.data.to(base.entries[name].torch_dtype)
    compute_in(base.dtype, base.model)


def _narrow(base: Base) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of the matrices that are not quantized."""
    for name, parameter in base.model.named_parameters():
        if name in base.narrow and parameter.is_floating_point():
            yield name, parameter


def multiply_in_fp32(dtype: torch.dtype, model: nn.Module) -> None:
    """Let the frozen dense linears of a model multiply in fp32 (`kernels/matmul.py`).

    They stay as they are where they have the `dtype` of what they are given, and the processor
    instructions for it.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
            continue
        held = layer.weight.dtype
        # One that is streamed has no weight yet, and on any device its numbers are the same ones.
        if device_type(layer.weight) == "cuda":
            continue
        if held.itemsize < dtype.itemsize or not is_native(held):
            layer.forward = functools.partial(_linear, layer)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`x W^T + bias`, (..., in) to (..., out); a weight that somebody trains is in the graph."""
    if layer.weight.requires_grad:
        return F.linear(x, layer.weight.to(x.dtype), layer.bias)
    return frozen_linear(layer, x)

"""Frozen linear layers in 4 and 8 bits, with our own matmuls on bitsandbytes' formats.

A quantized layer is an `nn.Linear` by class whose `weight` holds the packed bytes and whose scales
are buffers; nothing is read from a `quant_state` or the class of `weight`, which neither fake
tensors nor sharded modules keep. Three functions are all that the rest of the package knows of it:
`base_matmul` (y from x), `base_grad_input` (dx from dy) and `dequantize`; each takes an ordinary
`nn.Linear` as well, and one that is streamed. The autograd function keeps nothing for backward.

- 4 bits: both matmuls dequantize the weight to the dtype of their input first, on CUDA in one
  Triton kernel that decodes nested scales as well.
- 8 bits: W = C * s, a scale for each row of int8, which folds out of both matmuls exactly:
  y = (x C^T) * s and dx = (dy * s) C. In bf16 and fp16 no dequantized weight is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.base.encode_weight import BLOCKSIZE, encode_blocks
from qlora_kit.base.packed_matmul import packed_matmul
from qlora_kit.base.quantize import (
    Quantization,
    decode_blocks,
    dequantize_scales,
    quantize_8bit,
    quantize_scales,
)
from qlora_kit.base.resident import make_resident
from qlora_kit.base.tensors import NumberChecks
from qlora_kit.device.target import has_values, without_values
from qlora_kit.kernels.matmul import grad_input, linear, matmul_dtype, scale_columns
from qlora_kit.kernels.triton_ops import uses_triton
from qlora_kit.kernels.workspace import workspace

UNITS = {torch.float16: 128}
"""What int8 rows are divided by in a matmul: they stay exact, and sums of fp16 keep in range."""


class QuantizedLinear(nn.Linear):
    """What both quantized layers share: shapes of the dense weight, a frozen forward."""

    def __init__(
        self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None
    ) -> None:
        # Not nn.Linear.__init__: it would allocate the dense weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        held = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", held)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to (..., out_features) in the dtype of `x`."""
        return frozen_linear(self, x)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) as numbers, a new tensor."""
        raise NotImplementedError

    def dequantize_into_workspace(self, dtype: torch.dtype) -> Tensor:
        """The same for the next matmul only: on the CPU it lies in memory that is reused."""
        return self.dequantize(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to `x W^T + bias` (..., out_features), without a graph."""
        return linear(x, self.dequantize_into_workspace(x.dtype), self.bias)

    def grad_input(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad` (..., out_features) to `grad W` (..., in_features); added to `total` if given."""
        return grad_input(grad, self.dequantize_into_workspace(grad.dtype), total)


class Linear4bit(QuantizedLinear):
    """NF4 or FP4: `weight` (ceil(n/2), 1) uint8 packs two values a byte, `absmax` holds the scales.

    With double quant `absmax` is uint8 and `nested_absmax`, `nested_offset`, `nested_map` decode
    it; else it is fp32 of length ceil(n/64).
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_map: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        *,
        quant_type: str,
        absmax: Tensor,
        nested_absmax: Tensor | None = None,
        nested_offset: Tensor | None = None,
        nested_map: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, packed, bias)
        self.quant_type = quant_type
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_offset", nested_offset)
        # One table for all layers: it is bitsandbytes' constant, not a part of the checkpoint.
        self.register_buffer("nested_map", nested_map, persistent=False)

    def scales(self) -> Tensor:
        """The fp32 scale of every block, (ceil(n/64),)."""
        if self.nested_absmax is None:
            return self.absmax
        return dequantize_scales(self.absmax, *self._nested)

    def matmul(self, x: Tensor) -> Tensor:
        """`x W^T + bias`; a decoding step may read the packed weight."""
        found = packed_matmul(self, x)
        return super().matmul(x) if found is None else found

    @property
    def _nested(self) -> tuple[Any, ...]:
        return self.nested_absmax, self.nested_map, self.nested_offset

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all blocks; equal to the table entry times the scale, rounded once to `dtype`."""
        return self._decoded(self.weight.new_empty(self.padded_numel, dtype=dtype))

    def dequantize_into_workspace(self, dtype: torch.dtype) -> Tensor:
        """The same in the workspace."""
        return self._decoded(workspace(self.padded_numel, dtype, self.weight))

    @property
    def padded_numel(self) -> int:
        """Elements of the weight in whole blocks."""
        return -(-self.out_features * self.in_features // BLOCKSIZE) * BLOCKSIZE

    def _decoded(self, space: Tensor) -> Tensor:
        """The weight (out_features, in_features) at the start of `space`, (padded_numel,)."""
        numel = self.out_features * self.in_features
        if uses_triton(space) and numel == space.numel() > 0:
            given = self.weight.view(-1), self.absmax, *self._nested, self.quant_type
            torch.ops.qlora_kit.triton_dequantize.out(*given, out=space)
            return space.view(self.out_features, self.in_features)
        packed, scales = self.weight.view(-1), self.scales()
        full = numel // BLOCKSIZE
        if has_values(space):  # else nothing would be made
            into = space[: full * BLOCKSIZE]
            decode_blocks(packed[: full * BLOCKSIZE // 2], scales[:full], self.quant_type, into)
        else:
            without_values("dequantize", (packed, scales), (space,))
        if full * BLOCKSIZE < numel:
            rest = packed[full * BLOCKSIZE // 2 :]
            rest = F.pad(rest, (0, BLOCKSIZE // 2 - rest.numel()))
            decode_blocks(rest, scales[full:], self.quant_type, space[full * BLOCKSIZE :])
        return space[:numel].view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        double = ", double_quant" if self.nested_absmax is not None else ""
        return f"{self.in_features}, {self.out_features}, {self.quant_type}{double}"


class Linear8bit(QuantizedLinear):
    """LLM.int8 rows: `weight` (out_features, in_features) int8, `row_absmax` (out_features,) fp32.

    The value of an entry is `weight * row_absmax / 127`.
    """

    row_absmax: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        *,
        row_absmax: Tensor,
    ) -> None:
        super().__init__(in_features, out_features, packed, bias)
        self.register_buffer("row_absmax", row_absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`weight * row_absmax / 127`, computed in fp32 (fp64 for fp64) and rounded to `dtype`."""
        scales = self.row_absmax.double() if dtype is torch.float64 else self.row_absmax
        return (self.weight * (scales / 127).unsqueeze(1)).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """`x W^T + bias` with the scale applied to the result."""
        if x.dtype is torch.float32:
            # A scale in the weight rounds once less: 5.6e-6 against 1.4e-5 on gradients.
            return super().matmul(x)
        if matmul_dtype(x) is not x.dtype:
            return linear(x, self.weight, self.bias, self.row_absmax / 127)
        y = F.linear(x, self._unit_rows(x.dtype))
        scale_columns(y, self._unit_scales(x.dtype), out=y)
        return y if self.bias is None else y.add_(self.bias)

    def grad_input(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad W` with the scale applied to `grad`."""
        if grad.dtype is torch.float32:
            return super().grad_input(grad, total)
        if matmul_dtype(grad) is not grad.dtype:
            return grad_input(grad, self.weight, total, self.row_absmax / 127)
        scaled = torch.empty_like(grad, memory_format=torch.contiguous_format)
        scale_columns(grad, self._unit_scales(grad.dtype), out=scaled)
        return grad_input(scaled, self._unit_rows(grad.dtype), total)

    def _unit_rows(self, dtype: torch.dtype) -> Tensor:
        rows = workspace(self.weight.numel(), dtype, self.weight).view(self.weight.shape)
        rows.copy_(self.weight)
        return rows.div_(UNITS[dtype]) if dtype in UNITS else rows

    def _unit_scales(self, dtype: torch.dtype) -> Tensor:
        # Multiplying by the unit is exact; a rounded 128/127 would push every row the same way.
        return self.row_absmax * UNITS.get(dtype, 1) / 127

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, int8"


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    quantization: Quantization,
    *,
    name: str = "weight",
    checks: NumberChecks | None = None,
) -> QuantizedLinear:
    """A frozen quantized layer from a dense `weight` (out_features, in_features) on its device.

    Errors: `NumericError` naming `name` where the format cannot hold it; of `checks`, later.
    """
    out_features, in_features = weight.shape
    if quantization.bits == 8:
        rows, row_absmax = quantize_8bit(weight, name, checks)
        return Linear8bit(in_features, out_features, rows, bias, row_absmax=row_absmax)
    quant_type = quantization.quant_type
    assert quant_type is not None
    packed, absmax = encode_blocks(weight.reshape(-1), quant_type)
    scales = quantize_scales(absmax) if quantization.double_quant else {"absmax": absmax}
    return Linear4bit(in_features, out_features, packed, bias, quant_type=quant_type, **scales)


Quantize = Callable[..., QuantizedLinear]
"""`quantize_linear`, or what does the same in a plan."""


def base_matmul(layer: nn.Linear, x: Tensor) -> Tensor:
    """`x W^T + bias` of a frozen layer in any number of bits, without a graph.

    `x` (..., in_features) gives (..., out_features).
    """
    make_resident(layer)
    if isinstance(layer, QuantizedLinear):
        return layer.matmul(x)
    return linear(x, layer.weight, layer.bias)


def base_grad_input(layer: nn.Linear, grad: Tensor, total: Tensor | None = None) -> Tensor:
    """The gradient of `base_matmul` by `x`, for `grad` (..., out); in `total`, added, if given."""
    make_resident(layer)
    if isinstance(layer, QuantizedLinear):
        return layer.grad_input(grad, total)
    return grad_input(grad, layer.weight, total)


def frozen_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`base_matmul(layer, x)` in the graph of `x`; nothing of the weight is kept for backward."""
    if not torch.is_grad_enabled():
        return base_matmul(layer, x)
    return _FrozenMatmul.apply(x, layer)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenMatmul(torch.autograd.Function):
    """`base_matmul` whose backward reads the layer again and keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return base_matmul(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return base_grad_input(ctx.layer, grads[0]), None


def dequantize(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`, a new tensor."""
    make_resident(layer)
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    return layer.weight.detach().to(dtype, copy=True)

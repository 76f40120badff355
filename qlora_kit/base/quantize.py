"""Frozen linear layers in 4 and 8 bits, in bitsandbytes' formats, with our own products.

A quantized layer is an `nn.Linear` by class whose `weight` holds the packed bytes and whose scales
are buffers. Everything is read from these plain tensors, never from a `quant_state` or from the
class of `weight`, which neither fake tensors nor sharded modules keep. Three functions are all
that the rest of the package knows of it: `product` (y from x), `product_grad` (dx from dy) and
`dequantize`; each takes an ordinary `nn.Linear` as well. The autograd function keeps nothing for
backward: the weights do not train, so dx needs dy and the packed bytes only.

- 4 bits: blocks of 64 values share one scale; the scales are optionally quantized to 8 bits
  themselves (double quant). Products dequantize to the dtype of their input first.
- 8 bits: W = CB * s, a scale for each row, which folds out of both products exactly:
  y = (x CB^T) * s and dx = (dy * s) CB. In bf16 and fp16 no dequantized weight is ever made.

This module and `training/optimizer.py` are the only ones that import bitsandbytes.
Sources: Dettmers et al., QLoRA (arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from qlora_kit.base.imports import quiet_import
from qlora_kit.device import device_type, has_values, representative
from qlora_kit.errors import NumericError
from qlora_kit.kernels.matmul import grad_input, linear, matmul_dtype
from qlora_kit.kernels.workspace import own_workspace as own_workspace
from qlora_kit.kernels.workspace import tagged_workspace as tagged_workspace
from qlora_kit.kernels.workspace import workspace

with quiet_import():
    import bitsandbytes.functional as bnb
    from bitsandbytes import cextension

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
ENCODED_AT_ONCE = 2**17
SCALED_AT_ONCE = 32
KERNEL_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INT8_LIMIT = 65504.0
"""8-bit quantization goes through fp16 (bitsandbytes 0.50): larger weights would become zeros."""


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are held; `bits` 16 means not quantized."""

    bits: int
    quant_type: str | None = None
    double_quant: bool | None = None

    @property
    def blocksize(self) -> int | None:
        """Values that share a scale, in 4 bits."""
        return BLOCKSIZE if self.bits == 4 else None


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
        return _FrozenProduct.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) as numbers."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """`x W^T + bias` without a graph."""
        return linear(x, self.lent(x.dtype), self.bias)

    def product_grad(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad W`: the gradient of `product` by `x`; with `total`, added to it in place."""
        return grad_input(grad, self.lent(grad.dtype), total)

    def lent(self, dtype: torch.dtype) -> Tensor:
        """`dense` for the next product only: on the CPU it lies in memory that is used again."""
        return self.dense(dtype)


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
        if not has_values(self.absmax):
            # What the call below gives; a plan makes it a thousand times.
            return torch.empty_like(self.absmax, dtype=torch.float32)
        decoded = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.absmax, self.nested_absmax, self.nested_map, NESTED_BLOCKSIZE, torch.float32
        )
        return decoded.add_(self.nested_offset)  # type: ignore[no-any-return]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Decode all blocks; equal to the table entry times the scale, rounded once to `dtype`."""
        size = self.scales_count * BLOCKSIZE
        return self._decoded(torch.empty(size, dtype=dtype, device=self.weight.device))

    def lent(self, dtype: torch.dtype) -> Tensor:
        """`dense` in the workspace."""
        return self._decoded(workspace(self.scales_count * BLOCKSIZE, dtype, self.weight))

    @property
    def scales_count(self) -> int:
        """Blocks of the weight, the last one perhaps not full."""
        return -(-self.out_features * self.in_features // BLOCKSIZE)

    def _decoded(self, space: Tensor) -> Tensor:
        """The weight at the beginning of `space` (whole blocks)."""
        numel = self.out_features * self.in_features
        packed, scales = self.weight.view(-1), self.scales()
        full = numel // BLOCKSIZE
        # bitsandbytes 0.50 on AVX512 CPUs is silently wrong where a row is not a multiple of the
        # block, so the kernel always gets rows that are one block, whatever the layer's shape.
        if has_values(space):  # else nothing would be made
            _decode_blocks(
                packed[: full * BLOCKSIZE // 2],
                scales[:full],
                self.quant_type,
                space[: full * BLOCKSIZE],
            )
        if full * BLOCKSIZE < numel:
            rest = packed[full * BLOCKSIZE // 2 :]
            rest = F.pad(rest, (0, BLOCKSIZE // 2 - rest.numel()))
            _decode_blocks(rest, scales[full:], self.quant_type, space[full * BLOCKSIZE :])
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

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`weight * row_absmax / 127`, computed in fp32 (fp64 for fp64) and rounded to `dtype`."""
        scales = self.row_absmax.double() if dtype is torch.float64 else self.row_absmax
        return (self.weight * (scales / 127).unsqueeze(1)).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """`x W^T + bias` with the scale applied to the result."""
        if x.dtype is torch.float32:
            # A scale in the weight rounds once less: 5.6e-6 against 1.4e-5 on gradients.
            return super().product(x)
        if matmul_dtype(x) is not x.dtype:
            return linear(x, self.weight, self.bias, self.row_absmax / 127)
        y = F.linear(x, self._unit_rows(x.dtype))
        _multiply(y, self._unit_scales(x.dtype), out=y)
        return y if self.bias is None else y.add_(self.bias)

    def product_grad(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad W` with the scale applied to `grad`."""
        if grad.dtype is torch.float32:
            return super().product_grad(grad, total)
        if matmul_dtype(grad) is not grad.dtype:
            return grad_input(grad, self.weight, total, self.row_absmax / 127)
        scaled = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _multiply(grad, self._unit_scales(grad.dtype), out=scaled)
        return grad_input(scaled, self._unit_rows(grad.dtype), total)

    def _unit_rows(self, dtype: torch.dtype) -> Tensor:
        rows = workspace(self.weight.numel(), dtype, self.weight).view(self.weight.shape)
        rows.copy_(self.weight)
        # int8 is exact in either dtype; divided by a power of two, sums of fp16 keep in range.
        return rows.div_(_unit(dtype)) if _unit(dtype) > 1 else rows

    def _unit_scales(self, dtype: torch.dtype) -> Tensor:
        # The product by the unit is exact; a rounded 128/127 would push every row the same way.
        return self.row_absmax * _unit(dtype) / 127

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, int8"


class _FrozenProduct(torch.autograd.Function):
    """`product` whose backward reads the layer again and keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return product(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return product_grad(ctx.layer, grads[0]), None


def multiply_in_fp32(model: nn.Module) -> None:
    """Let the frozen dense linears of a model multiply as the processor does best.

    Where it has instructions for their dtype they stay as they are. See `kernels/matmul.py`.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
            continue
        if matmul_dtype(layer.weight) is not layer.weight.dtype:
            layer.forward = functools.partial(_frozen, layer)  # type: ignore[method-assign]


def _frozen(layer: nn.Linear, x: Tensor) -> Tensor:
    return _FrozenProduct.apply(x, layer)  # type: ignore[no-any-return, no-untyped-call]


def quantize_linear(
    weight: Tensor, bias: Tensor | None, quantization: Quantization, *, name: str = "weight"
) -> QuantizedLinear:
    """A frozen quantized layer from a dense `weight` (out_features, in_features) on its device.

    The bytes equal `bitsandbytes.functional.quantize_4bit` and `int8_vectorwise_quant` of the same
    tensor. Errors: `NumericError` naming `name` for a weight that the format cannot hold.
    """
    out_features, in_features = weight.shape
    if quantization.bits == 8:
        largest = weight.abs().max()
        if has_values(largest) and float(largest) > INT8_LIMIT:
            raise NumericError(
                f"{name} holds {float(largest):g}, and 8-bit quantization reaches {INT8_LIMIT:g}",
                "use --bits 4 or 16 for this model",
            )
        rows, row_absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return Linear8bit(in_features, out_features, rows, bias, row_absmax=row_absmax)
    assert quantization.quant_type is not None
    packed, absmax = encode_blocks(weight.reshape(-1), quantization.quant_type)
    nested = {}
    if quantization.double_quant:
        offset = absmax.mean()
        table = _dynamic_map(absmax.device)
        absmax, state = bnb.quantize_blockwise(absmax - offset, table, blocksize=NESTED_BLOCKSIZE)
        nested = {
            "nested_absmax": state.absmax,
            "nested_offset": offset,
            "nested_map": table,  # bitsandbytes 0.50 hands out a copy for each layer
        }
    return Linear4bit(
        in_features,
        out_features,
        packed,
        bias,
        quant_type=quantization.quant_type,
        absmax=absmax,
        **nested,
    )


Quantize = Callable[..., QuantizedLinear]
"""`quantize_linear`, or what does the same in a plan."""


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of double quant: one table for all layers on a device, and for plans."""
    with unset_fake_temporarily():
        return bnb.create_dynamic_map().to(device)  # type: ignore[no-any-return]


def code_tables(quant_type: str) -> tuple[Tensor, Tensor]:
    """The 16 values of a 4-bit format, and the 256 that double quant codes scales with."""
    return (
        bnb.get_4bit_type(quant_type, device="cpu", blocksize=BLOCKSIZE),
        bnb.create_dynamic_map(),
    )


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """`x W^T + bias` of a frozen layer in any number of bits, without a graph."""
    if isinstance(layer, QuantizedLinear):
        return layer.product(x)
    return linear(x, layer.weight, layer.bias)


def product_grad(layer: nn.Linear, grad: Tensor, total: Tensor | None = None) -> Tensor:
    """The gradient of `product` by `x` for `grad` (..., out_features); added to `total` if given.

    `total` (..., in_features) is changed in place and returned.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.product_grad(grad, total)
    return grad_input(grad, layer.weight, total)


def dequantize(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`, a new tensor."""
    if isinstance(layer, QuantizedLinear):
        return layer.dense(dtype)
    return layer.weight.detach().to(dtype, copy=True)


def quantized_bytes(layer: nn.Module) -> int:
    """Bytes of a quantized layer's weight and scales; 0 for any other module."""
    return sum(tensor.nbytes for tensor in quantized_tensors(layer))


def quantized_tensors(layer: nn.Module) -> list[Tensor]:
    """A quantized layer's weight and scales; none for any other module."""
    if not isinstance(layer, QuantizedLinear):
        return []
    return [layer.weight, *(b for n, b in layer.named_buffers() if n != "nested_map")]


def shared_tables(layer: nn.Module) -> list[Tensor]:
    """The table of double quant, which layers may share."""
    table = getattr(layer, "nested_map", None)
    return [] if table is None else [table]


@torch.library.custom_op("qlora_kit::encode_blocks", mutates_args=())
def encode_blocks(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Numbers (n,) to packed bytes (ceil(n/2), 1) and fp32 scales (ceil(n/64),).

    A part after the other: off CUDA bitsandbytes makes several fp32 copies of what it is given.
    """
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // BLOCKSIZE), device=flat.device)
    for start in range(0, flat.numel(), ENCODED_AT_ONCE):
        part = flat[start : start + ENCODED_AT_ONCE]
        bytes_, scales = torch.ops.bitsandbytes.quantize_4bit.default(
            part, BLOCKSIZE, quant_type, torch.uint8
        )
        packed[start // 2 : start // 2 + bytes_.numel()] = bytes_
        absmax[start // BLOCKSIZE : start // BLOCKSIZE + scales.numel()] = scales
    return packed, absmax


@encode_blocks.register_fake
def _(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    packed = flat.new_empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
    return packed, flat.new_empty(-(-flat.numel() // BLOCKSIZE), dtype=torch.float32)


def _multiply(rows: Tensor, scales: Tensor, out: Tensor) -> None:
    """16-bit `rows` (..., n) times fp32 `scales` (n,), rounded once, into `out`.

    Few rows at once on the CPU: torch makes fp32 copies of both sides, which then stay in cache.
    """
    rows, out = rows.reshape(-1, rows.shape[-1]), out.view(-1, rows.shape[-1])
    step = SCALED_AT_ONCE if device_type(rows) == "cpu" else max(1, rows.shape[0])
    for start in representative(range(0, rows.shape[0], step), rows):
        torch.mul(rows[start : start + step], scales, out=out[start : start + step])


def _unit(dtype: torch.dtype) -> int:
    """What int8 rows are divided by in a product."""
    return 128 if dtype is torch.float16 else 1


def _decode_blocks(packed: Tensor, scales: Tensor, quant_type: str, out: Tensor) -> None:
    """Whole blocks to numbers, flat, into `out`."""
    if scales.numel() == 0 or not has_values(out):
        return  # every way below writes into `out` and makes nothing
    call = None
    if out.device.type == "cpu":
        # The op of this name makes a new tensor on the CPU; what it calls writes where it is told.
        name = f"cdequantize_blockwise_cpu_{quant_type}_{KERNEL_DTYPES.get(out.dtype)}"
        call = getattr(cextension.lib, name, None)
    if call is not None:
        call(
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(scales.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_longlong(BLOCKSIZE),
            ctypes.c_longlong(scales.numel()),
            ctypes.c_longlong(BLOCKSIZE),
        )
        return
    shape = (scales.numel(), BLOCKSIZE)
    arguments = (packed.view(-1, 1), scales, BLOCKSIZE, quant_type, shape, out.dtype)
    if out.device.type == "cuda":
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out.view(shape))
    else:
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*arguments).view(-1))

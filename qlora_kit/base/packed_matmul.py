"""Products of a decoding step with 4-bit weights that stay packed, by bitsandbytes' kernels.

On CUDA the kernel reads the weight as it lies there (`quantize.decoding`). On CPUs with AVX512-BF16
bitsandbytes (0.50) has one for tokens in bf16, `gemv_4bit`, that reads another order: of each 32
rows the bytes of one column pair lie side by side, and scales are in bf16, a row for each block of
columns. So such a weight is laid out again when a step first reads it, for the time of the
decoding: 0.53 bytes a parameter more, for the time of about ten products by the decoded weight.
Where memory is short it is decoded as before.

It is as exact as the product by a weight that is decoded to bf16 (2.6e-3 of the norm against
2.3e-3, where fp32 would be 1e-7, and so tokens in fp32 or fp16 never take it). It was 4 to 6 times
as fast for 1 and 2 rows on one thread, 2 times for 8, and as fast for 64 (768 x 768 to
2048 x 5632). A row's result does not depend on the rows beside it while they are 64 at most: more
are multiplied by the decoded weight.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qlora_kit.base.encode_weight import BLOCKSIZE, encode_blocks
from qlora_kit.base.quantize import code_tables, cpu_kernel, fused_matmul, is_fused
from qlora_kit.device.found import free_bytes
from qlora_kit.device.target import has_values, set_inside
from qlora_kit.kernels.workspace import workspace

ROWS = 32
"""Rows whose bytes lie side by side: bitsandbytes' own number."""
MOST_TOKENS = 64
TAKEN, SPARE = 3, 2**30
"""Times its bytes that a weight takes while it is laid out, and bytes that are left to the rest:
to caches that grow, and to other programs."""
NEAR = 0.01
"""Of the norm; a wrong order of bytes is about 1 away."""

Copies = WeakKeyDictionary[nn.Module, "Copy"]
"""By linear; one that goes, as that of an adapter which was merged, takes its copy along."""
_COPIES: ContextVar[Copies | None] = ContextVar("copies", default=None)


class Copy:
    """A packed weight and its scales in the order that the kernel reads."""

    def __init__(
        self, packed: Tensor, scales: Tensor, shape: tuple[int, int], quant_type: str
    ) -> None:
        rows, columns = self.shape = shape
        # (out / 32, 32, in / 2) to (out / 32, in / 2, 32): a byte has two columns of a row. What is
        # in between lies in the workspace: fresh memory left holes between the copies.
        size, groups, half = packed.numel(), rows // ROWS, ROWS // 2
        space = workspace(size + size // 2, torch.uint8, packed)
        by_column = space[:size].view(groups, columns // 2, ROWS)
        by_column.copy_(packed.view(groups, ROWS, columns // 2).transpose(1, 2))
        upper, lower = by_column[..., :half], by_column[..., half:]
        # Then two rows of a column: those 16 apart.
        bytes_ = packed.new_empty(groups, columns // 2, half, 2)
        first, second, some = bytes_[..., 0], bytes_[..., 1], space[size:].view(upper.shape)
        torch.bitwise_right_shift(upper, 4, out=first)
        first.bitwise_or_(torch.bitwise_and(lower, 0xF0, out=some))
        torch.bitwise_and(upper, 0xF, out=second)
        second.bitwise_or_(torch.bitwise_left_shift(lower, 4, out=some))
        self._packed = bytes_.view(rows, columns // 2)
        self._scales = scales.view(rows, -1).t().to(torch.bfloat16).contiguous()
        kernel = cpu_kernel(f"gemv_4bit_inference_cpu_{quant_type}_bf16")
        assert kernel is not None
        self._kernel = kernel

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self._packed.nbytes + self._scales.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """`x` (..., in) in bf16 times the weight, (..., out)."""
        (rows, columns), x = self.shape, x.contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        # Not the op of this name, whose own Python takes longer than a small product.
        sizes = map(ctypes.c_int64, (x.numel() // columns, rows, columns))
        read = x, self._packed, self._scales, y
        tensors = [ctypes.c_void_p(one.data_ptr()) for one in read]
        strides = map(ctypes.c_int64, (BLOCKSIZE, columns, rows))
        self._kernel(*sizes, *tensors, *strides)
        return y


def copying_into(copies: Copies | None) -> AbstractContextManager[None]:
    """Inside, steps of few tokens on a CPU read such copies, which are made there; None: do not."""
    return set_inside(_COPIES, copies)


def copied_bytes(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """What copies of all 4-bit linears among `modules` take, where steps in `dtype` make them."""
    linears: list[Any] = [
        one for one in modules if getattr(one, "quant_type", None) and _has_order(one)
    ]
    if dtype is not torch.bfloat16 or not linears or linears[0].weight.device.type != "cpu":
        return 0
    if not has_values(linears[0].weight) or not _is_right():
        return 0
    # Two bytes a scale: of a block each.
    return sum(one.weight.nbytes + 4 * one.weight.nbytes // BLOCKSIZE for one in linears)


def _has_order(layer: Any) -> bool:
    """Whether the kernel's order is for weights of this shape."""
    return bool(layer.in_features % BLOCKSIZE == 0 and layer.out_features % ROWS == 0)


def packed_matmul(layer: Any, x: Tensor) -> Tensor | None:
    """`x W^T + bias` of a `Linear4bit`; None where its weight is to be decoded first."""
    if is_fused(x, layer.in_features):
        nested = layer.nested_absmax, layer.nested_map, layer.nested_offset
        form = (layer.out_features, layer.in_features), layer.quant_type, layer.absmax, nested
        return fused_matmul(x, layer.weight, *form, layer.bias)
    copies = _COPIES.get()
    if (
        copies is None
        or x.dtype is not torch.bfloat16
        or x.device.type != "cpu"
        or x.numel() > MOST_TOKENS * layer.in_features
        or not _has_order(layer)
        or not has_values(x)
        or not _is_right()
    ):
        return None
    if layer not in copies:
        if free_bytes(x.device) < TAKEN * layer.weight.nbytes + SPARE:
            return None
        shape = layer.out_features, layer.in_features
        copies[layer] = Copy(layer.weight, layer.scales(), shape, layer.quant_type)
    y = copies[layer].matmul(x)
    return y if layer.bias is None else y.add_(layer.bias)


@functools.cache
def _is_right() -> bool:
    """Whether this processor has the kernel, and it reads the order above."""
    # bitsandbytes registers it where the processor has the instructions.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemv_4bit", "CPU"):
        return False
    if cpu_kernel("gemv_4bit_inference_cpu_nf4_bf16") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * ROWS, 2 * BLOCKSIZE, generator=generator)
    x = torch.randn(3, 2 * BLOCKSIZE, generator=generator).bfloat16()
    for quant_type in ("nf4", "fp4"):
        packed, scales = encode_blocks(weight.view(-1), quant_type)
        codes = packed.view(-1)
        numbers = torch.stack((codes >> 4, codes & 0xF), dim=1).long()
        decoded = code_tables(quant_type)[0][numbers].view(-1, BLOCKSIZE) * scales[:, None]
        exact = x.float() @ decoded.view(weight.shape).t()
        found = Copy(packed, scales, (2 * ROWS, 2 * BLOCKSIZE), quant_type).matmul(x)
        if float((found - exact).norm()) > NEAR * float(exact.norm()):
            return False
    return True

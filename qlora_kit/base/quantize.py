"""bitsandbytes' formats of 4 and 8 bits: numbers to packed bytes and scales, and back.

- 4 bits: blocks of 64 values share one scale; the scales are optionally quantized to 8 bits
  themselves (double quant), in blocks of 256.
- 8 bits: rows of int8 with one fp32 scale each; a value is `weight * row_absmax / 127`.

The bytes equal `bitsandbytes.functional.quantize_4bit` and `int8_vectorwise_quant` of the same
tensor. This module and `training/optimizer.py` are the only ones that import bitsandbytes; the
layers that hold what it gives are in `linear.py`.
Sources: Dettmers et al., QLoRA (arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base.encode_weight import BLOCKSIZE, encode_rows
from qlora_kit.base.imports import quiet_import
from qlora_kit.base.tensors import NumberChecks
from qlora_kit.device.target import (
    device_type,
    has_own_memory,
    has_values,
    set_inside,
    without_values,
)
from qlora_kit.errors import NumericError, ResourceError

with quiet_import():
    import bitsandbytes
    import bitsandbytes.functional as bnb
    from bitsandbytes import cextension
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary as NoLibrary

NESTED_BLOCKSIZE = 256
CPU = torch.device("cpu")
KERNEL_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DECODING: ContextVar[bool] = ContextVar("decoding", default=False)
INT8_LIMIT = 65504.0
"""8-bit quantization goes through fp16 (bitsandbytes 0.50): larger weights would become zeros."""


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are held; `bits` 16 means not quantized."""

    bits: int
    quant_type: str | None = None
    double_quant: bool | None = None
    skip_modules: str | tuple[str, ...] | None = None
    """Linears that stay as they are, by names or a regex."""
    head_bits: int = 16
    """Those of the output head."""

    @property
    def blocksize(self) -> int | None:
        """Values that share a scale, in 4 bits."""
        return BLOCKSIZE if self.bits == 4 else None


def check_library(device: torch.device) -> None:
    """Refuse a device that bitsandbytes has no library for. Errors: `ResourceError`.

    It says so when it is imported, then goes on, and its first kernel raises.
    """
    library = cextension.lib
    if not has_own_memory(device) or library.compiled_with_cuda:
        return
    said = str(library.error_msg) if isinstance(library, NoLibrary) else "it took that of the CPU"
    raise ResourceError(
        f"bitsandbytes {bitsandbytes.__version__} has no library for this torch "
        f"({torch.__version__}): {said}",
        "`python -m bitsandbytes` lists those that it has: install torch for one of them, or give "
        "--device cpu",
    )


def quantize_8bit(
    weight: Tensor, name: str, checks: NumberChecks | None = None
) -> tuple[Tensor, Tensor]:
    """A weight (out, in) to int8 rows (out, in) and their fp32 scales (out,).

    Errors: `NumericError` naming `name` for a value that the format cannot hold, at once or where
    `checks` are read.
    """

    def error(largest: float) -> NumericError:
        return NumericError(
            f"{name} holds {largest:g}, and 8-bit quantization reaches {INT8_LIMIT:g}",
            "use --bits 4 or 16 for this model",
        )

    looked_at = NumberChecks() if checks is None else checks
    looked_at.add(weight, INT8_LIMIT, error)
    if checks is None:
        looked_at.read()
    if device_type(weight) == "cuda":  # where its kernel makes no copy
        rows, row_absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return rows, row_absmax
    return encode_rows(weight)  # type: ignore[no-any-return]


def quantize_scales(absmax: Tensor) -> dict[str, Tensor]:
    """Double quant of fp32 scales (blocks,): uint8 `absmax` (blocks,) and what decodes it."""
    offset = absmax.mean()
    # A plan has the table with its values, whatever the device.
    table = dynamic_map(absmax.device if has_values(absmax) else CPU).to(absmax.device)
    codes, state = bnb.quantize_blockwise(absmax - offset, table, blocksize=NESTED_BLOCKSIZE)
    return {
        "absmax": codes,
        "nested_absmax": state.absmax,
        "nested_offset": offset,
        "nested_map": table,  # bitsandbytes 0.50 hands out a copy for each layer
    }


def dequantize_scales(
    codes: Tensor, nested_absmax: Tensor, nested_map: Tensor | None, offset: Tensor | None
) -> Tensor:
    """The fp32 scales (blocks,) that double quant coded as uint8 `codes` (blocks,)."""
    if not has_values(codes):
        # What the call below gives; a plan makes it a thousand times.
        scales = torch.empty_like(codes, dtype=torch.float32)
        without_values("dequantize", (codes, nested_absmax), (scales,))
        without_values("dequantize", (scales,), (scales,))  # the offset
        return scales
    decoded = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, nested_absmax, nested_map, NESTED_BLOCKSIZE, torch.float32
    )
    return decoded.add_(offset)  # type: ignore[no-any-return]


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of double quant: one table for all layers on a device, and for plans."""
    with unset_fake_temporarily():
        return bnb.create_dynamic_map().to(device)  # type: ignore[no-any-return]


def code_tables(quant_type: str) -> tuple[Tensor, Tensor]:
    """The 16 values of a 4-bit format, and the 256 that double quant codes scales with."""
    return (
        bnb.get_4bit_type(quant_type, device="cpu", blocksize=BLOCKSIZE),
        bnb.create_dynamic_map(),
    )


def state_tensors(
    shape: tuple[int, int],
    dtype: torch.dtype,
    quant_type: str,
    absmax: Tensor,
    nested: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> dict[str, Tensor]:
    """What bitsandbytes' checkpoints hold of a 4-bit weight beside its packed bytes, by its names.

    `dtype` is what its own forward dequantizes to; `nested` as in `fused_matmul`.
    """
    nested_absmax, nested_map, offset = nested
    inner, (code, _) = None, code_tables(quant_type)
    if nested_absmax is not None:
        inner = bnb.QuantState(
            nested_absmax, None, nested_map, NESTED_BLOCKSIZE, dtype=torch.float32
        )
    whole = torch.Size(shape)
    state = bnb.QuantState(absmax, whole, code, BLOCKSIZE, quant_type, dtype, offset, inner)
    return state.as_dict(packed=True)  # type: ignore[no-any-return]


def library_linear(
    shape: tuple[int, int], weight: Tensor, dtype: torch.dtype, said: dict[str, Tensor]
) -> Any:
    """bitsandbytes' own layer (out, in) on our tensors, without a bias.

    `said` is what its checkpoints hold beside `weight`: of `state_tensors` in 4 bits, `SCB` in 8.
    """
    out_features, in_features = shape
    with torch.device("meta"):  # it makes a dense weight first
        if "SCB" in said:
            layer = bitsandbytes.nn.Linear8bitLt(
                in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
        else:
            layer = bitsandbytes.nn.Linear4bit(in_features, out_features, False, dtype)
    if "SCB" in said:
        rows = {"CB": weight, "SCB": said["SCB"], "has_fp16_weights": False}
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, **rows)
        return layer
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        weight, dict(said), device=weight.device, module=layer
    )
    # In evaluation it would pack the weight anew in place, and gradients be wrong from then on
    # (0.50).
    layer.support_avx512bf16_for_cpu = False
    return layer


def decode_blocks(packed: Tensor, scales: Tensor, quant_type: str, out: Tensor) -> None:
    """Packed whole blocks (b * 32,) and their scales (b,) to numbers, into `out` (b * 64,).

    bitsandbytes 0.50 on AVX512 CPUs is silently wrong where a row is not a multiple of the block,
    so the kernel always gets rows that are one block, whatever the layer's shape.
    """
    if scales.numel() == 0 or not has_values(out):
        return  # every way below writes into `out` and makes nothing
    if out.dtype not in KERNEL_DTYPES:
        single = torch.empty_like(out, dtype=torch.float32)
        decode_blocks(packed, scales, quant_type, single)
        out.copy_(single)
        return
    # The op of this name makes a new tensor on the CPU; what it calls writes where it is told.
    name = f"cdequantize_blockwise_cpu_{quant_type}_{KERNEL_DTYPES[out.dtype]}"
    call = cpu_kernel(name) if out.device.type == "cpu" else None
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


@functools.cache
def cpu_kernel(name: str) -> Callable[..., None] | None:
    """A kernel of bitsandbytes' own library, where it found one that has it.

    Of a name that it does not have the module hands out a function that raises.
    """
    library = None if isinstance(cextension.lib, NoLibrary) else cextension.lib._lib
    return getattr(library, name, None)


def decoding() -> AbstractContextManager[None]:
    """Inside, 4-bit matmuls on CUDA read the packed weight in the kernel that multiplies.

    For steps of one token a row. There a weight that is dequantized first costs 4.5 bytes a value
    (0.5 read, 2 written, 2 read again in 16 bits), and in one kernel 0.56. How many rows pay is
    bitsandbytes' choice for each card (0.50, `backends/cuda/ops.py`): up to 4 always. So the same
    rows take the same kernel in every step, and training, which is never inside, takes none of it.
    """
    return set_inside(_DECODING, True)


def is_fused(x: Tensor, in_features: int) -> bool:
    """Whether `fused_matmul` is to multiply `x` (..., in_features): see `decoding`.

    bitsandbytes has had the operation since 0.50; it takes rows of whole blocks only.
    """
    return (
        _DECODING.get()
        and device_type(x) == "cuda"
        and x.dtype in KERNEL_DTYPES
        and in_features % BLOCKSIZE == 0
        and hasattr(torch.ops.bitsandbytes, "gemm_4bit")
    )


def fused_matmul(
    x: Tensor,
    packed: Tensor,
    shape: tuple[int, int],
    quant_type: str,
    absmax: Tensor,
    nested: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> Tensor:
    """`x` (..., in) times a packed weight of `shape` (out, in), plus bias: (..., out).

    `nested` are `nested_absmax`, `nested_map` and `nested_offset`, or all None where `absmax` is
    fp32.
    """
    scales, codes = (absmax, None) if nested[0] is None else (nested[0], absmax)
    return torch.ops.bitsandbytes.gemm_4bit.default(  # type: ignore[no-any-return]
        x, packed.view(-1, 1), shape, scales, BLOCKSIZE, quant_type, bias, codes, *nested[1:]
    )

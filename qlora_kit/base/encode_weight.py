"""bitsandbytes' quantizing of a whole tensor, one part after another.

Blocks and rows are independent, so the bytes are those of one call. Off CUDA bitsandbytes makes
several fp32 copies of what it is given. On CUDA it makes none, and counts in 32 bits.

The operations are bitsandbytes' own, which `quantize.py` imports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.device.target import device_type

BLOCKSIZE = 64
ENCODED_AT_ONCE, MOST_AT_ONCE = 2**17, 2**30


@torch.library.custom_op("qlora_kit::encode_blocks", mutates_args=())
def encode_blocks(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Numbers (n,) to packed bytes (ceil(n/2), 1) and fp32 scales (ceil(n/64),)."""
    at_once = _at_once(flat)
    if flat.numel() <= at_once:
        made = torch.ops.bitsandbytes.quantize_4bit.default(
            flat, BLOCKSIZE, quant_type, torch.uint8
        )
        return made[0], made[1]
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // BLOCKSIZE), device=flat.device)
    for start in range(0, flat.numel(), at_once):
        part = flat[start : start + at_once]
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


@torch.library.custom_op("qlora_kit::encode_rows", mutates_args=())
def encode_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) to int8 rows (out, in) and their fp32 scales (out,)."""
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    row_absmax = torch.empty(weight.shape[0], device=weight.device)
    at_once = max(1, _at_once(weight) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], at_once):
        part = weight[start : start + at_once].half()
        codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(part)
        rows[start : start + at_once] = codes
        row_absmax[start : start + at_once] = scales
    return rows, row_absmax


@encode_rows.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return rows, weight.new_empty(weight.shape[0], dtype=torch.float32)


def _at_once(numbers: Tensor) -> int:
    return ENCODED_AT_ONCE if device_type(numbers) != "cuda" else MOST_AT_ONCE

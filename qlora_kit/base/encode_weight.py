"""bitsandbytes' quantizing of a whole tensor, one part after another.

Blocks and rows are independent, so the bytes are those of one call. Off CUDA bitsandbytes makes
several fp32 copies of what it is given. On CUDA it makes none, and counts in 32 bits.

The operations are bitsandbytes' own, which `quantize.py` imports; on the CPU blocks of 4 bits are
coded by `kernels/encode_cpu.py`, once it has given their bytes of numbers where any other rounding,
any other side of a midpoint would show. int8 rows take a fifteenth of that time to begin with.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_kit.device.target import device_type
from qlora_kit.kernels.encode_cpu import BlockCodes

BLOCKSIZE = 64
ENCODED_AT_ONCE, MOST_AT_ONCE = 2**17, 2**30


@torch.library.custom_op("qlora_kit::encode_blocks", mutates_args=())
def encode_blocks(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Numbers (n,) to packed bytes (ceil(n/2), 1) and fp32 scales (ceil(n/64),)."""
    whole = flat.numel() // BLOCKSIZE * BLOCKSIZE
    codes = _fast_codes(quant_type) if flat.device.type == "cpu" else None
    if codes is not None and whole == flat.numel():
        return codes.encode(flat)
    if codes is None and flat.numel() <= _at_once(flat):
        return _encode(flat, quant_type)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // BLOCKSIZE), device=flat.device)
    at_once, start = _at_once(flat), 0
    if codes is not None:
        start = whole  # of a block that is not whole bitsandbytes has another arithmetic
        packed[: whole // 2], absmax[: whole // BLOCKSIZE] = codes.encode(flat[:whole])
    for begin in range(start, flat.numel(), at_once):
        bytes_, scales = _encode(flat[begin : begin + at_once], quant_type)
        packed[begin // 2 : begin // 2 + bytes_.numel()] = bytes_
        absmax[begin // BLOCKSIZE : begin // BLOCKSIZE + scales.numel()] = scales
    return packed, absmax


def _encode(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """What bitsandbytes makes of numbers."""
    made = torch.ops.bitsandbytes.quantize_4bit.default(flat, BLOCKSIZE, quant_type, torch.uint8)
    return made[0], made[1]


@functools.cache
def _fast_codes(quant_type: str) -> BlockCodes | None:
    """Codes by comparisons, where this version of bitsandbytes makes the same ones."""
    codes = BlockCodes(quant_type, BLOCKSIZE)
    numbers = trying_numbers(codes.middles.reshape(-1).tolist())
    theirs = _encode(numbers, quant_type)
    same = all(map(torch.equal, codes.encode(numbers), theirs))
    return codes if same else None


def trying_numbers(middles: list[float]) -> Tensor:
    """Blocks whose codes another arithmetic would change, (b * 64,) in fp32.

    Each midpoint, the numbers next to it on both sides, and zeros, times scales from the least that
    fp32 has to the largest; then a block of zeros.
    """
    exact = torch.tensor(middles)
    ends = (torch.nextafter(exact, torch.tensor(end)) for end in (-2.0, 2.0))
    block = torch.cat([exact, *ends, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    block = torch.cat([block, block.new_zeros(BLOCKSIZE - block.numel())])
    scales = [1.0, 0.0, 3e38, 2**-140, 1e-38, *(0.02 * 1.37**power for power in range(24))]
    return (torch.tensor(scales).unsqueeze(1) * block).view(-1)


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

"""Codes by comparisons are bitsandbytes' own, on numbers where any other rounding shows."""

from __future__ import annotations

import bitsandbytes.functional as bf
import pytest
import torch

from qlora_kit.base import encode_weight
from qlora_kit.base.encode_weight import encode_blocks, encode_rows, trying_numbers
from qlora_kit.kernels import encode_cpu
from qlora_kit.kernels.encode_cpu import BlockCodes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNT = 2**20


def theirs(flat, quant_type):
    packed, state = bf.quantize_4bit(flat, blocksize=64, quant_type=quant_type)
    return packed, state.absmax


def hostile_numbers(quant_type):
    """A million: midpoints times scales and their neighbours, every size, and what is no number."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.from_numpy(BlockCodes(quant_type, 64).middles).reshape(-1)
    scales = torch.randn(COUNT // 128, 1, generator=generator).abs() * 0.05
    blocks = middles[torch.randint(15, (COUNT // 128, 64), generator=generator)] * scales
    blocks[:, :1] = scales
    # As many next to them: the last bit of each is drawn.
    blocks.view(torch.int32).add_(torch.randint(-1, 2, blocks.shape, generator=generator).int())
    bits = torch.randint(-(2**31), 2**31, (COUNT // 128, 64), generator=generator)
    any_bits = bits.to(torch.int32).view(torch.float32)
    any_bits[::3].nan_to_num_(0, 0, 0)
    any_bits[1::3] *= 2.0**-100
    trying = trying_numbers(middles.tolist())
    return torch.cat([blocks.view(-1), any_bits.view(-1), trying])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_million_hostile_numbers_get_their_bytes_and_scales(quant_type):
    assert encode_weight._fast_codes(quant_type) is not None
    numbers = hostile_numbers(quant_type)
    assert numbers.numel() > 1e6
    for dtype in DTYPES:
        flat = numbers.to(dtype)
        (packed, absmax), (bytes_, scales) = (
            BlockCodes(quant_type, 64).encode(flat),
            theirs(flat, quant_type),
        )
        assert torch.equal(packed, bytes_), dtype
        assert torch.allclose(absmax, scales, rtol=0, atol=0, equal_nan=True), dtype


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bits", ["nf4", "fp4", 8])
def test_what_a_dtype_holds_is_quantized_as_in_fp32(bits, dtype):
    """So a tensor is not cast first; also the last block, which is not whole."""
    weight = torch.randn(33, 130, generator=torch.Generator().manual_seed(5)).to(dtype)
    made = encode_rows if bits == 8 else (lambda w: encode_blocks(w.reshape(-1), bits))
    for one, other in zip(made(weight), made(weight.float()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 64 * 1200 + 7])
def test_what_is_no_whole_block_is_theirs_too(numel):
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).bfloat16()
    found = encode_blocks(flat, "nf4")
    for one, other in zip(found, theirs(flat, "nf4"), strict=True):
        assert torch.equal(one, other)


def test_threads_share_the_blocks_and_change_no_byte(monkeypatch):
    """In ranges of whole blocks, none left out, for blocks that do not divide evenly."""
    flat = torch.randn(64 * 1001, generator=torch.Generator().manual_seed(3))
    alone = BlockCodes("nf4", 64).encode(flat)
    monkeypatch.setattr(encode_cpu, "LEAST_A_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(BlockCodes("nf4", 64).encode(flat), alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("code", [2, 8, 13])
def test_a_value_a_little_apart_is_found_and_theirs_are_taken(monkeypatch, code):
    """As a bitsandbytes with another table, or another rounding of it, would be."""
    values = torch.tensor(encode_cpu.NF4)
    values.view(torch.int32)[code] += 2  # of which a midpoint may keep one
    monkeypatch.setitem(encode_cpu.VALUES, "nf4", tuple(values.tolist()))
    encode_weight._fast_codes.cache_clear()
    try:
        assert encode_weight._fast_codes("nf4") is None
        flat = torch.randn(1000, generator=torch.Generator().manual_seed(1))
        for one, other in zip(encode_blocks(flat, "nf4"), theirs(flat, "nf4"), strict=True):
            assert torch.equal(one, other)
    finally:
        encode_weight._fast_codes.cache_clear()

"""Triton: packed 4-bit weights to numbers, nested scales decoded on the way.

One kernel where torch takes three and writes the fp32 scales in between. A word of 32 bits holds
eight values: byte after byte, and of each byte the upper half first. A thread reads words of 16
bytes in all and writes eight values of a word side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 512
"""Words that one program decodes: 4,096 values, 64 scales."""
WARPS = 4


@triton.jit
def decode(
    words,
    absmax,
    nested_absmax,
    nested_map,
    nested_offset,
    out,
    count,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    WORDS: tl.constexpr,
):
    """`count` int32 words and their scales into `out` (8 * count,): table entry times scale."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < count
    packed = tl.load(words + word, mask=inside, other=0)
    block = word // 8
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        # Rounded after the product and after the sum: compiled without fused multiply-add.
        scale = tl.load(nested_map + code) * tl.load(
            nested_absmax + block // 256, mask=inside, other=0.0
        )
        scale = scale + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    place = tl.arange(0, 8)
    code = packed[:, None] >> (place // 2 * 8 + (1 - place % 2) * 4)[None, :]
    value = fp4(code) if FP4 else nf4(code)  # one of them is compiled
    value = value * scale[:, None]
    into = out + word[:, None] * 8 + place[None, :]
    tl.store(into, value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def nf4(code):
    """The NF4 value of the lowest four bits: 15 choices, no table to load."""
    one, two = (code & 1) != 0, (code & 2) != 0
    four, eight = (code & 4) != 0, (code & 8) != 0
    a = tl.where(one, -0.6961928009986877, -1.0)
    b = tl.where(one, -0.39491748809814453, -0.5250730514526367)
    c = tl.where(one, -0.18477343022823334, -0.28444138169288635)
    d = tl.where(one, 0.0, -0.09105003625154495)
    e = tl.where(one, 0.16093020141124725, 0.07958029955625534)
    f = tl.where(one, 0.33791524171829224, 0.24611230194568634)
    g = tl.where(one, 0.5626170039176941, 0.44070982933044434)
    h = tl.where(one, 1.0, 0.7229568362236023)
    a, c = tl.where(two, b, a), tl.where(two, d, c)
    e, g = tl.where(two, f, e), tl.where(two, h, g)
    return tl.where(eight, tl.where(four, g, e), tl.where(four, c, a))


@triton.jit
def fp4(code):
    """The FP4 value of the lowest four bits: a sign, and eight sizes."""
    one, two = (code & 1) != 0, (code & 2) != 0
    a = tl.where(one, 0.0052083334885537624, 0.0)
    b = tl.where(one, 1.0, 0.6666666865348816)
    c = tl.where(one, 0.5, 0.3333333432674408)
    d = tl.where(one, 0.25, 0.1666666716337204)
    size = tl.where((code & 4) != 0, tl.where(two, d, c), tl.where(two, b, a))
    # Not `-size`: code 8 is zero, and not minus zero.
    return tl.where((code & 8) != 0, 0.0 - size, size)


def launch_decode(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    out: Tensor,
) -> None:
    """`packed` whole blocks (b * 32,) uint8 and their scales (b,) into `out` (b * 64,)."""
    count = packed.numel() // 4
    decode[(triton.cdiv(count, WORDS),)](
        packed.view(torch.int32),
        absmax,
        nested_absmax,
        nested_map,
        nested_offset,
        out,
        count,
        NESTED=nested_absmax is not None,
        FP4=quant_type == "fp4",
        WORDS=WORDS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )

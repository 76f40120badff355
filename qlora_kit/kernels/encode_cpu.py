"""Numbers to 4-bit codes on the CPU, to the bit as bitsandbytes makes them.

bitsandbytes 0.50 has no kernel for this: its operation is made of torch's, of which `bucketize`
takes 20 ns a number. Here a code is a count of comparisons. The 16 values of a format, in order,
have 15 midpoints; of a number divided by its block's largest, the code is 15 less the midpoints
that it is at or below, and comparing many numbers with one midpoint is a few vector instructions.
They are numpy's: torch compares one by one where it gives booleans, five times as slowly.

All arithmetic before them is theirs, in fp32 and in their order: the largest size of a block, its
reciprocal, and a product, so that a number at a midpoint falls to the same side. NaN is at or below
nothing, which makes it code 15 as theirs is.

Each thread takes a range of its own; torch and numpy both release Python's lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MOST_AT_ONCE = 2**15 - 1
"""Numbers that are in fp32 at once: they stay in a core's cache, and are too few for torch to
share them out among threads, which these are already."""
LEAST_A_THREAD = 2**19
MOST_THREADS = 4
"""Between their calls threads wait for Python's lock."""
SMALLEST = 1e-38
"""What bitsandbytes divides a block of zeros by."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
VALUES = {"nf4": NF4, "fp4": FP4}
"""The value of each code: NF4 of Dettmers et al. (arXiv 2305.14314), FP4 with a bit of sign, two
of exponent and one of mantissa."""


class BlockCodes:
    """The codes of one format: `encode` gives those of whole blocks, of `blocksize` numbers."""

    def __init__(self, quant_type: str, blocksize: int) -> None:
        self.blocksize = blocksize
        values = torch.tensor(VALUES[quant_type], dtype=torch.float32)
        order = torch.argsort(values)
        middles = (values[order[:-1]] + values[order[1:]]) / 2
        self.middles = middles.numpy()[:, None]  # (15, 1)
        bytes_ = torch.arange(256)
        self._renamed: Tensor | None = None
        if not torch.equal(order, torch.arange(16)):
            # Of a byte, which is two codes by size, what the format calls them.
            self._renamed = (order[bytes_ // 16] * 16 + order[bytes_ % 16]).to(torch.uint8)

    def encode(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (b * blocksize,) to packed bytes (n/2, 1), the first of two in the high bits.

        With them the fp32 scale of each block, (b,).
        """
        size = self.blocksize
        at_once = MOST_AT_ONCE // size * size
        packed = torch.empty(flat.numel() // 2, dtype=torch.uint8)
        absmax = torch.empty(flat.numel() // size)

        def encode_range(first: int, end: int) -> None:
            space = torch.empty(2, at_once)
            below = np.empty((15, at_once), dtype=np.bool_)
            count = np.empty(at_once, dtype=np.uint8)
            for start in range(first, end, at_once):
                stop = min(start + at_once, end)
                numbers, sizes = space[:, : stop - start].view(2, -1, size)  # (b, size) each
                numbers.copy_(flat[start:stop].view(-1, size))
                scales = absmax[start // size : stop // size]
                torch.amax(torch.abs(numbers, out=sizes), -1, out=scales)
                numbers.mul_((1.0 / scales.clamp(min=SMALLEST)).unsqueeze(-1))
                part = below[:, : stop - start]
                np.less_equal(numbers.view(-1).numpy(), self.middles, out=part)
                codes = count[: stop - start]
                np.add.reduce(part.view(np.uint8), axis=0, dtype=np.uint8, out=codes)
                self._pack(codes, packed[start // 2 : stop // 2])

        _in_threads(encode_range, flat.numel(), size)
        return packed.unsqueeze(1), absmax

    def _pack(self, counts: np.ndarray, into: Tensor) -> None:
        """Counts (n,) of midpoints at or above each number to bytes (n/2,)."""
        # Two counts as they lie in memory, the first in the low byte of a little-endian number.
        pairs = counts.view("<u2")
        both = pairs >> 8
        both |= pairs << 4
        # 255 less both is 15 less each.
        np.subtract(255, both, out=both)
        np.copyto(into.numpy(), both, casting="unsafe")
        if self._renamed is not None:
            into.copy_(self._renamed.index_select(0, into.int()))


def _in_threads(work: Callable[[int, int], None], size: int, unit: int) -> None:
    """Call `work` with ranges of whole units that make up `size`, in torch's number of threads."""
    threads = min(torch.get_num_threads(), MOST_THREADS, size // LEAST_A_THREAD)
    if threads <= 1:
        work(0, size)
        return
    units = size // unit
    ends = [units * number // threads * unit for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, ends[:-1], ends[1:]))

"""Tokens in tiles: parts of a batch that one thing after another is done to.

What is the same for one token whatever stands beside it can go over tiles, and then holds what it
makes of one tile only. Where results are sums over tokens, they are summed tile by tile in order,
whether the rest goes over tiles or not: so both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from qlora_kit.device.target import representative
from qlora_kit.kernels.matmul import matmul_fp32

TILE_TOKENS = 2048
"""The most tokens of a tile. A matmul with each then takes some twenty times as long as decoding
its 4-bit weight for it, and of an MLP of 8 billion parameters a tile takes 0.25 GB."""


def each_tile(tokens: Tensor) -> Iterator[tuple[int, slice]]:
    """The fewest tiles of tokens (N, ...), numbered, as large as each other where N allows it.

    None has much less than half of `TILE_TOKENS` unless it is the only one: a matmul of very few
    rows may add up in another order than one of many.
    """
    count = tokens.shape[0]
    size = max(1, -(-count // max(1, -(-count // TILE_TOKENS))))
    for number in representative(range(max(1, -(-count // size))), tokens):
        yield number, slice(number * size, min((number + 1) * size, count))


def matmul_over_tokens(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * left^T right` in fp32: the sum over tokens, (N, m) and (N, k) to (m, k)."""
    total: Tensor | None = None
    for _, rows in each_tile(left):
        part = matmul_fp32(left[rows].t(), right[rows])
        if scale != 1.0:
            part.mul_(scale)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total

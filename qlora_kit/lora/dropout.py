"""Tokens in tiles, and dropout that draws the same mask for the same place of a run.

What is the same for one token whatever stands beside it can go over tiles, and then holds what it
makes of one tile only. Where results are sums over tokens, they are summed tile by tile in order,
whether the rest goes over tiles or not: so both ways give the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

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


Position = tuple[int, int, int]
"""Step and micro-step of a run, and the number of the first of a batch's tiles of tokens."""


class KeyedDropout(nn.Module):
    """Dropout whose mask follows from seed, layer, step, micro-step and tile of tokens alone.

    Recomputing a layer, or a step that is tried again, draws the same mask without any saved
    random state. The training loop calls `seek` on whatever has it.
    """

    def __init__(self, p: float, seed: int, layer_name: str) -> None:
        super().__init__()
        self.p = p
        self._key = f"{seed} {layer_name}"
        self._position = (0, 0)

    def seek(self, step: int, micro_step: int) -> None:
        """Say where the run stands; masks drawn from here on belong to that place."""
        self._position = (step, micro_step)

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of `x` and scale up the rest; the identity in evaluation mode."""
        return self.at(self.position, x)

    @property
    def position(self) -> Position | None:
        """Where masks are drawn for now, for all tokens; None where nothing is dropped."""
        return (*self._position, 0) if self.training and self.p else None

    def at(self, position: Position | None, x: Tensor) -> Tensor:
        """Drop out `x` (..., n), or its gradient of the same shape, with the mask of a `position`.

        A tile that is given alone, with its number, gets its part of the mask of all tokens.
        """
        if position is None:
            return x
        step, micro_step, first = position
        keep = torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
        rows = keep.view(-1, x.shape[-1])  # (..., n) to (N, n)
        for number, tile in each_tile(rows):
            place = f"{step} {micro_step}"
            if first + number:
                place = f"{place} {first + number}"
            digest = hashlib.sha256(f"{self._key} {place}".encode()).digest()
            generator = torch.Generator(device=x.device)
            generator.manual_seed(int.from_bytes(digest[:7], "little"))
            rows[tile].bernoulli_(1 - self.p, generator=generator)
        return x * keep * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}"

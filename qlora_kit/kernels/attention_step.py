"""Attention of one query a row, as a decoding step has it, in 16 bits on a CPU.

torch's kernel (2.13) takes blocks of queries, and turns keys and values around for them: for one
query in bf16 that is 3 to 24 times as slow as two matmuls on fp32 copies of keys and values, and no
more exact, since these round once, at the end. The copies are of some heads at a time.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qlora_kit.device.target import has_values

COPIED = 2**24
"""Numbers of keys that are in fp32 at once: 64 MiB, and as much for values."""


def is_step(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_one` is for such tensors: one query a row, 16 bits, on a CPU."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype is key.dtype is value.dtype
        and query.shape[1] % key.shape[1] == 0
        and not torch.is_grad_enabled()
        and has_values(query)
    )


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Queries (B, H, 1, d) on keys and values (B, kv heads, T, d) to (B, 1, H, d).

    `mask` (B or 1, H or 1, 1, T) is false for what is hidden, or numbers to be added; None hides
    nothing. H / kv heads queries in a row read the same keys.
    """
    rows, heads, _, width = query.shape
    kv_heads, tokens = key.shape[1:3]
    groups = heads // kv_heads
    query = query.reshape(rows, kv_heads, groups, width)
    if mask is not None:
        mask = mask.expand(rows, heads, 1, tokens).reshape(rows, kv_heads, groups, tokens)
    out = query.new_empty(rows, kv_heads, groups, value.shape[-1])
    of_head = max(1, tokens * max(width, value.shape[-1]))
    rows_at_once = max(1, COPIED // (of_head * kv_heads))
    heads_at_once = min(kv_heads, max(1, COPIED // of_head))
    for row, head in itertools.product(
        range(0, rows, rows_at_once), range(0, kv_heads, heads_at_once)
    ):
        some = slice(row, row + rows_at_once), slice(head, head + heads_at_once)
        # (rows, kv heads, groups, d) times (rows, kv heads, d, T)
        scores = (query[some].float() * scale) @ key[some].float().transpose(2, 3)
        if mask is not None and mask.dtype is torch.bool:
            scores.masked_fill_(mask[some].logical_not(), -torch.inf)
        elif mask is not None:
            scores.add_(mask[some])
        out[some] = scores.softmax(-1) @ value[some].float()
    return out.view(rows, 1, heads, -1)

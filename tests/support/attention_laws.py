"""Attention of packs by a kernel of CUDA, against a mask of all pairs in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.attention_cuda import Rows, attend_packed

SCALE = 0.3
PACKS = [[7, 1, 22], [30], [15, 15]]
WHOLE = [[30], [30], [30]]
LONG = [[700, 1, 323], [1024]]


def drawn(
    lengths: Sequence[Sequence[int]], heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values and a gradient of the output, as projections lie in memory."""
    generator = torch.Generator().manual_seed(heads + width)
    shape = len(lengths), sum(lengths[0])
    return [
        torch.randn(*shape, count, width, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def rows_of(lengths: Sequence[Sequence[int]], device: str = "cpu") -> Rows:
    ends = torch.tensor([0, *(n for one in lengths for n in one)]).cumsum(0)
    return Rows(lengths, ends.to(device, torch.int32))


def results(
    inputs: Sequence[Tensor], grad: Tensor, attend: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """The output and the gradients by queries, keys and values."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attend(*inputs)
    return output, *torch.autograd.grad(output, inputs, grad)


def by_mask(
    lengths: Sequence[Sequence[int]], window: int | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The library's attention under a mask of all pairs."""
    width = sum(lengths[0])
    mask = torch.zeros(len(lengths), 1, width, width, dtype=torch.bool)
    for number, row in enumerate(lengths):
        first = 0
        for count in row:
            own = torch.ones(count, count, dtype=torch.bool).tril().triu(1 - (window or count))
            mask[number, :, first : first + count, first : first + count] = own
            first += count
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
    )


def check(
    lengths: Sequence[Sequence[int]],
    kernel: str,
    window: int | None,
    dtype: torch.dtype,
    device: str,
    limit: float,
    width: int = 64,
) -> None:
    """Output and gradients of 4 heads and 2 key heads are within `limit` of double precision."""
    given = drawn(lengths, 4, 2, width, dtype)
    rows, (*inputs, grad) = rows_of(lengths, device), (x.to(device) for x in given)
    found = results(inputs, grad, lambda *parts: attend_packed(*parts, SCALE, kernel, rows, window))
    *inputs, grad = (x.double() for x in given)
    expected = results(inputs, grad, by_mask(lengths, window))
    for ours, reference in zip(found, expected, strict=True):
        # Of one key there is no gradient by the query.
        assert (ours.cpu().double() - reference).norm() <= limit * (1 + reference.norm())

"""Cross-entropy through a frozen output head, in chunks of tokens, so that logits are few.

The logits of all tokens are never held: a few hundred tokens at a time reach the head, and each
chunk's gradient by the hidden states is made while its logits are there. What is kept for backward
has the size of the hidden states. Without a gradient, as in evaluation, nothing is kept.

A chunk's logits lie in the dtype that they are multiplied in, and are at most `CHUNK_BYTES`
whatever the vocabulary; softmax and gradient are computed in fp32, some tokens of the chunk at a
time, and written over them. A quantized head comes in tiles of its rows, which are decoded twice a
chunk, for the logits and for the gradient, and so there a chunk is larger. Of 128 Ki tokens by
4,096 features a chunk has 512 tokens. Decoding twice for them takes less than the other way, one
softmax over all tiles in a running maximum, which decodes twice a step and computes the logits
twice: by the peaks of data sheets 2.7 against 3.3 ms on an RTX 4090, 7.6 against 21 on an RTX 3060.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.device.target import representative
from qlora_kit.kernels.matmul import grad_input, linear_into, matmul_dtype

CHUNK_TOKENS, CHUNK_BYTES = 256, 2**26
TILED_TOKENS, TILED_BYTES = 1024, 2**27
"""The most tokens of a chunk, and bytes of its logits; the same of a head in tiles."""
WIDE_BYTES = 2**25
"""Of logits of a chunk that are in fp32 at once, where they are multiplied in 16 bits."""
MULTIPLE = 16
"""Matrix units like such numbers of tokens."""


class Tile(Protocol):
    """Some rows of a head, decoded when it is multiplied by them."""

    def matmul(self, x: Tensor) -> Tensor:
        """`x` (n, h) to the logits (n, rows)."""

    def grad_input(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """`grad` (n, rows) to (n, h); added to `total` if given."""


Tiles = Sequence[tuple[slice, Tile]]


def cross_entropy_sum(
    tokens: Tensor,
    head: nn.Linear,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of -log softmax(scale * head(tokens))[targets], a scalar in fp32.

    `tokens` (N, h), `targets` (N,). The weight of `head` is (V, h), or it has `tiles` of its rows
    with the slices of V that they are. The head is frozen: backward reaches `tokens` only. With
    `softcap` c the scaled logits are c * tanh(logits / c).
    """
    given = softcap, scale, *_head(head)
    return _CrossEntropy.apply(tokens, targets, True, *given)  # type: ignore[no-any-return, no-untyped-call]


def cross_entropy_tokens(
    tokens: Tensor,
    head: nn.Linear,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What `cross_entropy_sum` is the sum of: -log p of each token, (N,) in fp32."""
    given = softcap, scale, *_head(head)
    return _CrossEntropy.apply(tokens, targets, False, *given)  # type: ignore[no-any-return, no-untyped-call]


def _head(head: nn.Linear) -> tuple[Tensor, Tensor | None, Tiles | None, int]:
    """Weight, bias, tiles and vocabulary of an output head."""
    return head.weight, head.bias, getattr(head, "tiles", None), head.out_features


def chunk_tokens(vocabulary: int, itemsize: int, tiled: bool) -> int:
    """Tokens whose logits are there at once: a fixed number, fewer of a large vocabulary."""
    most, nbytes = (TILED_TOKENS, TILED_BYTES) if tiled else (CHUNK_TOKENS, CHUNK_BYTES)
    return min(most, max(1, nbytes // (vocabulary * itemsize) // MULTIPLE) * MULTIPLE)


class _CrossEntropy(torch.autograd.Function):
    """The chunked loss, `summed` or of each token.

    Its gradient by the tokens is made in forward, and scaled in backward by that of the loss.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, targets: Tensor, summed: bool, *given: Any) -> Tensor:
        shape = () if summed else tokens.shape[:1]
        losses = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        grad_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        for rows, log_p in _chunks(tokens, targets, grad_tokens, *given):
            if summed:
                losses -= log_p.sum()
            else:
                torch.neg(log_p.squeeze(1), out=losses[rows])
        ctx.save_for_backward(grad_tokens)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_tokens,) = ctx.saved_tensors
        return grad_tokens * grads[0].to(grad_tokens.dtype).unsqueeze(-1), *(None,) * 8


def _chunks(
    tokens: Tensor,
    targets: Tensor,
    grad_tokens: Tensor | None,
    softcap: float | None,
    scale: float,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles | None,
    vocabulary: int,
) -> Iterator[tuple[slice, Tensor]]:
    """The log-probabilities (n, 1) of each chunk of tokens, and where it is.

    They are written over by the next chunk's. Where `grad_tokens` is given, the chunk's gradient of
    minus their sum is in it.
    """
    dtype = matmul_dtype(tokens)
    at_once = chunk_tokens(vocabulary, dtype.itemsize, tiles is not None)
    # Buffers for all chunks: on the CPU fresh memory of this size costs a chunk's time.
    chunk = min(at_once, tokens.shape[0])
    space = tokens.new_empty(chunk, vocabulary, dtype=dtype)
    few = max(1, min(chunk, WIDE_BYTES // (4 * vocabulary)))
    wide = None
    if dtype is not torch.float32:
        wide = space.new_empty(few, vocabulary, dtype=torch.float32)
    log_p = tokens.new_empty(chunk, 1, dtype=torch.float32)
    for start in representative(range(0, tokens.shape[0], at_once), tokens):
        part = tokens[start : start + at_once].to(dtype)
        count = part.shape[0]  # the last chunk is short
        logits, index = space[:count], targets[start : start + count].unsqueeze(1)
        _logits_into(logits, part, weight, bias, tiles)
        for first in representative(range(0, count, few), tokens):
            rows = slice(first, min(first + few, count))
            some = logits[rows]
            found = some if wide is None else wide[: some.shape[0]].copy_(some)
            _softmax(found, index[rows], softcap, scale, log_p[rows], grad_tokens is not None)
            if wide is not None and grad_tokens is not None:
                some.copy_(found)
        if grad_tokens is not None:
            _grad_into(grad_tokens[start : start + count], logits, weight, tiles)
        yield slice(start, start + count), log_p[:count]


def _logits_into(
    logits: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles | None
) -> None:
    """`tokens` (n, h) through the head, into `logits` (n, V) of the same dtype."""
    if tiles is not None:
        for columns, tile in representative(tiles, tokens):
            logits[:, columns] = tile.matmul(tokens)
        if bias is not None:
            logits.add_(bias)
        return
    linear_into(logits, tokens, weight, bias)


def _softmax(
    logits: Tensor,
    index: Tensor,
    softcap: float | None,
    scale: float,
    log_p: Tensor,
    with_grad: bool,
) -> None:
    """Logits (n, V) of the head to log-probabilities of `index` (n, 1), into `log_p` (n, 1).

    With `with_grad` the logits become the gradient of minus their sum by what the head gives.
    """
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    # d/dlogits of the sum is softmax - one_hot, through the soft cap where there is one.
    slope = None
    if softcap is not None and with_grad:
        slope = (logits / softcap).square_().neg_().add_(1)
    torch.log_softmax(logits, 1, out=logits)
    torch.gather(logits, 1, index, out=log_p)
    if not with_grad:
        return
    logits.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=logits.dtype))
    if slope is not None:
        logits.mul_(slope)
    if scale != 1.0:
        logits.mul_(scale)


def _grad_into(into: Tensor, grad: Tensor, weight: Tensor, tiles: Tiles | None) -> None:
    """The gradient (n, h) by the tokens from that by the logits, `grad` (n, V)."""
    if tiles is not None:
        # Tiles are summed in fp32, and rounded once.
        found = torch.zeros_like(into, dtype=torch.float32)
        for columns, tile in representative(tiles, into):
            if grad.dtype is found.dtype:
                tile.grad_input(grad[:, columns], found)
            else:
                found += tile.grad_input(grad[:, columns])
        into.copy_(found)
    elif grad.dtype is into.dtype is weight.dtype:
        torch.mm(grad, weight, out=into)
    elif grad.dtype is into.dtype:
        grad_input(grad, weight, into.zero_())
    else:
        into.copy_(grad_input(grad, weight))

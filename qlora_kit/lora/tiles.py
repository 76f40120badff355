"""The MLP half of a decoder block over tiles of tokens, forward and backward.

An MLP with its norms gives each token the same whatever stands beside it. So gate, up and their
combination, the widest tensors of a layer, need not exist for more than a tile of tokens
(`dropout.py`). Kept for backward is the middle residual alone; backward goes over the
tiles again, and of each computes what `layer.py` would have kept, and at once the gradients. That
is the work of a layer that recomputes everything, at every level: forward once, and once more in
backward. The weights are decoded once a tile.

As in `layer.py` there are two nodes of the graph, so that a replay ends before the tiles. The bits
are those of all tokens at once: rows of matmuls do not depend on each other, gradients by adapters
are summed tile by tile in either case, and so are the masks of dropout drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.lora.dropout import each_tile
from qlora_kit.lora.layer import part_of
from qlora_kit.lora.low_rank import LowRank, Part
from qlora_kit.lora.passes import backward_through, outputs_of


@dataclass(frozen=True)
class TiledMlp:
    """`x + scale * after(down(gate(gate_up(before(x)))))`, with the adapters that take part.

    `first` are gate and up, or one linear of both.
    """

    before: FrozenNorm | None
    first: tuple[Part, ...]
    gate: Gate
    last: Part
    after: FrozenNorm | None
    scale: float

    @classmethod
    def of(
        cls,
        norms: tuple[FrozenNorm | None, FrozenNorm | None],
        gate_up: Sequence[nn.Module],
        gate: Gate,
        down: nn.Module,
        scale: float,
    ) -> TiledMlp:
        """From the norms before and behind an MLP, and its linears with or without adapters."""
        first = tuple(part_of(layer) for layer in gate_up)
        return cls(norms[0], first, gate, part_of(down), norms[1], scale)

    @property
    def weights(self) -> list[Tensor]:
        """A and B of each adapter, in the order in which gradients come."""
        return [weight for part in (*self.first, self.last) for weight in part.weights]

    def of_tile(self, number: int) -> TiledMlp:
        """The same for the tile of that number."""
        first, last = tuple(part.of_tile(number) for part in self.first), self.last.of_tile(number)
        return TiledMlp(self.before, first, self.gate, last, self.after, self.scale)

    def added(self, x: Tensor, into: Tensor) -> None:
        """The sum for a tile `x` (N, h) into another one, without a graph."""
        tokens = x if self.before is None else self.before.apply(x)[0]
        gate_up = outputs_of(self.first, tokens, LowRank.of(self.first, tokens))
        del tokens
        gated, _ = self.gate.apply(*gate_up)
        del gate_up
        (y,) = outputs_of((self.last,), gated, LowRank.of((self.last,), gated))
        del gated
        if self.after is not None:
            y = self.after.apply(y)[0]
        torch.add(x, self._scaled(y), out=into)

    def gradients(
        self, x: Tensor, grad: Tensor, needed: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """From `grad` (N, h) by the sum of a tile those by `x` (N, h), if `needed`, and weights."""
        tokens, scales = (x, None) if self.before is None else self.before.apply(x)
        low_rank = LowRank.of(self.first, tokens)
        gate_up, of_first = outputs_of(self.first, tokens, low_rank), low_rank.hidden
        del tokens, low_rank
        adapted = any(part.weights for part in self.first)
        grads, of_last = self._through_last(gate_up, grad, needed or adapted)
        del gate_up
        saved = [*of_first, *(weight for part in self.first for weight in part.weights)]
        through = self.first, self.before, (x,), scales, saved
        if self.before is not None:
            (by_x,), by_first = backward_through(*through, grads, needed, grad)
        else:
            (by_x,), by_first = backward_through(*through, grads, needed)
            by_x = None if by_x is None else by_x.add_(grad)
        return by_x, [*by_first, *of_last]

    def _through_last(
        self, gate_up: Sequence[Tensor], grad: Tensor, needed: bool
    ) -> tuple[Sequence[Tensor | None], list[Tensor | None]]:
        """The gradients by gate and up (N, f), if `needed`, and by the last linear's weights."""
        parts, hidden = (self.last,), list[Tensor]()
        if self.last.weights or self.after is not None:
            gated, _ = self.gate.apply(*gate_up)
            low_rank = LowRank.of(parts, gated)
            hidden = list(low_rank.hidden)
            if self.after is None:
                del gated, low_rank
        grad = self._scaled(grad)
        if self.after is not None:
            (y,) = outputs_of(parts, gated, low_rank)
            del gated, low_rank
            _, scales = self.after.apply(y)
            (grad,) = self.after.backward(grad, y, kept=scales)
            del y
        saved = [*hidden, *self.last.weights]
        return backward_through(parts, self.gate, gate_up, None, saved, (grad,), needed)

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.scale == 1.0 else y * self.scale


def mlp_in_tiles(mlp: TiledMlp, x: Tensor) -> Tensor:
    """`TiledMlp.added` of all tokens `x` (B, T, h), as nodes of the graph.

    `x` is overwritten in backward: nothing else may read it from then on.
    """
    shared = _Shared(mlp)
    tie = _KeepInput.apply(shared, x, *mlp.weights)  # type: ignore[no-untyped-call]
    return _Tiles.apply(shared, tie, x, *mlp.weights)  # type: ignore[no-any-return, no-untyped-call]


def over_tiles(run: Callable[[int, Tensor, Tensor], object], x: Tensor) -> Tensor:
    """What `run` makes of `x` (B, T, h), (B, T, h) as well, tile by tile and without a graph.

    It is given a tile's number, the tile (N, h), and where its result is to be.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, into = x.reshape(-1, x.shape[-1]), result.view(-1, x.shape[-1])
    for number, rows in each_tile(tokens):
        run(number, tokens[rows], into[rows])
    return result


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, a node of the graph, in the memory of `y`, which nobody else reads."""
    return _Added.apply(x, y) if x.dtype is y.dtype else x + y  # type: ignore[no-any-return, no-untyped-call]


class _Added(torch.autograd.Function):
    """Not `y.add_(x)`: the results of some matmuls are views, in which autograd does not write."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.detach().add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


@dataclass
class _Shared:
    """What both nodes know; `node` is the context of the first one, where backward finds `x`."""

    mlp: TiledMlp
    node: Any = None


class _KeepInput(torch.autograd.Function):
    """Keeps the middle residual (B, T, h) and the masters; its result only ties the other node."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        shared.node = ctx
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Tiles(torch.autograd.Function):
    """Goes over the tiles, (B, T, h) to (B, T, h), and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, tie: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.shared = shared
        return over_tiles(lambda number, *tile: shared.mlp.of_tile(number).added(*tile), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shared: _Shared = ctx.shared
        x, *weights = shared.node.saved_tensors
        needed = ctx.needs_input_grad[2]
        # The gradient by a tile takes the place of the tile: of all tokens there is one tensor.
        grad_x = x if x.is_contiguous() and grads[0].dtype is x.dtype else torch.empty_like(x)
        tokens, into, grad = (one.reshape(-1, x.shape[-1]) for one in (x, grad_x, grads[0]))
        totals: list[Tensor | None] = [None] * len(weights)
        for number, rows in each_tile(tokens):
            mlp = shared.mlp.of_tile(number)
            by_x, found = mlp.gradients(tokens[rows], grad[rows], needed)
            if by_x is not None:
                into[rows].copy_(by_x)
            del by_x
            for place, one in enumerate(found):
                total = totals[place]
                totals[place] = one if total is None or one is None else total.add_(one)
        return None, None, grad_x if needed else None, *totals

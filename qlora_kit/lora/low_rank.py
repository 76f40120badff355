"""The low-rank part of linears that read the same tokens: A x, B A x, and the gradients by both.

Each linear by itself, or (on CUDA) all of them together where their adapters allow it: one launch
casts the masters, the A's lie in one matrix, and so one matmul computes A x of all, one the
gradients by all A, and one what all send back to the tokens, whose gradient it reads and writes
once. There the scaling is a factor of matmuls: kept is scaling * A x, and no kernel scales alone.
The gradients are then summed in fp32 and not rounded to 16 bits on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_kit.device.target import device_type
from qlora_kit.kernels.matmul import adapter_dtype, add_matmul, linear, matmul, matmul_fp32
from qlora_kit.lora.dropout import KeyedDropout, Position, each_tile, matmul_over_tokens


@dataclass(frozen=True)
class Part:
    """One linear of a group: its base, and what its active adapter computes with.

    `weights` are A (r, in_features) and B (out_features, r), or none: the fp32 masters of training,
    or frozen ones in the adapter dtype.
    """

    base: nn.Linear
    weights: tuple[Tensor, ...] = ()
    scaling: float = 1.0
    dtype: torch.dtype = torch.float32
    dropout: KeyedDropout | None = None
    position: Position | None = None

    @property
    def has_update(self) -> bool:
        """Whether an adapter takes part beside the base."""
        return bool(self.weights)

    @property
    def by_row(self) -> bool:
        """Whether what takes part differs from row to row: then it wants all tokens at once."""
        return False

    def of_tile(self, number: int) -> Part:
        """The same for the tile of that number alone, where it drops out any of its tokens."""
        if self.position is None:
            return self
        return replace(self, position=(*self.position[:2], number))

    def dropped(self, x: Tensor) -> Tensor:
        """`x` (..., in_features), or its gradient, through the mask of the forward pass."""
        return x if self.dropout is None else self.dropout.at(self.position, x)

    def down(self, tokens: Tensor) -> Tensor:
        """A x (..., r) of tokens (..., in_features)."""
        lora_a = self.weights[0].to(self.dtype)
        return linear(self.dropped(tokens).to(self.dtype), lora_a)

    def up(self, hidden: Tensor, y: Tensor) -> None:
        """Add B A x to the output `y` (..., out_features); `hidden` is what `down` gave."""
        _add_matmul(y, hidden, self.weights[1].to(self.dtype).t(), self.scaling)

    def add_to(self, y: Tensor, tokens: Tensor) -> None:
        """Both at once for the output `y` of tokens, where nothing is kept for backward."""
        dtype = adapter_dtype(tokens, self.dtype)
        lora_a, lora_b = (weight.to(self.dtype).to(dtype) for weight in self.weights)
        hidden = linear(self.dropped(tokens).to(dtype), lora_a)
        _add_matmul(y, hidden, lora_b.t(), self.scaling)


def delta_weight(part: Part) -> Tensor:
    """The dense update `scaling * B @ A` in fp32, (out_features, in_features).

    It is computed from what training multiplied by: A and B rounded to the adapter dtype.
    """
    lora_a, lora_b = (weight.detach().to(part.dtype).float() for weight in part.weights)
    return (lora_b @ lora_a).mul_(part.scaling)


def together(parts: Sequence[Part], tokens: Tensor) -> bool:
    """Whether the adapters of some linears are computed together.

    On a CPU they are not: a few kernels more cost nothing there. Nor are those with dropout, which
    do not read the same tokens, and those of different scalings or dtypes.
    """
    adapted = [part for part in parts if part.weights]
    alike = {(part.scaling, part.dtype) for part in adapted}
    return (
        device_type(tokens) == "cuda"
        and len(alike) == 1
        and adapted[0].dtype is not adapted[0].weights[0].dtype
        and all(part.position is None for part in adapted)
    )


def cast_together(parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """All A in one matrix (sum of r, in_features) and each B (out_features, r), by one launch."""
    adapted = [part for part in parts if part.weights]
    ups = [part.weights[1] for part in adapted]
    downs = [part.weights[0] for part in adapted]
    dtype, ranks = adapted[0].dtype, [down.shape[0] for down in downs]
    stacked = downs[0].new_empty(sum(ranks), downs[0].shape[1], dtype=dtype)
    cast = [torch.empty_like(up, dtype=dtype) for up in ups]
    torch._foreach_copy_([*torch.split(stacked, ranks), *cast], [*downs, *ups])
    return stacked, cast


@dataclass
class LowRank:
    """What forward computes with: A x (..., r) of each adapted linear, as it is kept.

    `ups` are the B's where they are cast already.
    """

    parts: Sequence[Part]
    hidden: Sequence[Tensor]
    ups: Sequence[Tensor] = ()

    @classmethod
    def of(cls, parts: Sequence[Part], tokens: Tensor | None) -> LowRank:
        """A x of tokens (..., in_features), which only linears without an adapter do without."""
        adapted = [part for part in parts if part.weights]
        if not adapted:
            return cls(parts, ())
        assert tokens is not None
        if together(parts, tokens):
            stacked, ups = cast_together(parts)
            dtype, ranks = stacked.dtype, [up.shape[1] for up in ups]
            # (..., in) to (N, in), and (N, sum of r) to (..., r) of each.
            flat = tokens.reshape(-1, tokens.shape[-1]).to(dtype)
            hidden = flat.new_empty(flat.shape[0], stacked.shape[0])
            hidden.addmm_(flat, stacked.t(), beta=0, alpha=adapted[0].scaling)
            return cls(parts, torch.split(hidden.view(*tokens.shape[:-1], -1), ranks, dim=-1), ups)
        return cls(parts, [part.down(tokens) for part in adapted])

    def add_to(self, y: Tensor, place: int) -> None:
        """Add the update of the linear at `place` to its output (..., out_features)."""
        part = self.parts[place]
        if not part.weights:
            return
        number = _number(self.parts, place)
        if self.ups:
            _add_matmul(y, self.hidden[number], self.ups[number].t(), 1.0)
        else:
            part.up(self.hidden[number], y)


class LowRankBackward:
    """The gradients by the masters, and what the adapters send back to the tokens.

    `tokens` (..., in_features) went in, `hidden` is what `LowRank` had, `masters` are A and B of
    each adapted linear.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokens: Tensor,
        hidden: Sequence[Tensor],
        masters: Sequence[Tensor],
    ) -> None:
        self._parts, self._tokens, self._hidden, self._masters = parts, tokens, hidden, masters
        self._by_a: dict[int, Tensor] = {}
        self._by_b: dict[int, Tensor] = {}
        self._grad_hidden: Tensor | None = None
        self._together = together(parts, tokens)
        if self._together:
            self._stacked, self._ups = cast_together(parts)
            self._flat = tokens.reshape(-1, tokens.shape[-1]).to(self._stacked.dtype)

    def take(self, place: int, grad: Tensor, grad_tokens: Tensor | None) -> None:
        """Go on with `grad` (..., out_features), that by the output of the linear at `place`.

        What its A sends back is added to `grad_tokens` (..., in_features), here or at the end.
        """
        part = self._parts[place]
        if not part.weights:
            return
        number = _number(self._parts, place)
        if not self._together:
            masters = self._masters[2 * number], self._masters[2 * number + 1]
            self._by_a[number], self._by_b[number] = _gradients(
                part, grad, self._tokens, self._hidden[number], masters, grad_tokens
            )
            return
        up, hidden = self._ups[number], self._hidden[number]
        flat = grad.reshape(-1, grad.shape[-1]).to(up.dtype)  # (..., out) to (N, out)
        self._piece(number).addmm_(flat, up, beta=0, alpha=part.scaling)
        # That by A comes at the end.
        self._by_b[number] = matmul_over_tokens(flat, hidden.reshape(-1, hidden.shape[-1]))

    def gradients(self, grad_tokens: Tensor | None) -> list[Tensor | None]:
        """Those by A (r, in_features) and B (out_features, r) of each; None where none came."""
        adapted = sum(bool(part.weights) for part in self._parts)
        if self._together and self._grad_hidden is not None:
            for number in range(adapted):
                if number not in self._by_b:
                    self._piece(number).zero_()
            ranks = [up.shape[1] for up in self._ups]
            by_a = torch.split(matmul_over_tokens(self._grad_hidden, self._flat), ranks)
            if grad_tokens is not None:
                _add_matmul(grad_tokens, self._grad_hidden, self._stacked, 1.0)
            self._by_a = {number: by_a[number] for number in self._by_b}
        found: list[Tensor | None] = []
        for number in range(adapted):
            found += self._by_a.get(number), self._by_b.get(number)
        return found

    def _piece(self, number: int) -> Tensor:
        """The columns (N, r) of the gradient by A x that are one linear's."""
        if self._grad_hidden is None:
            self._grad_hidden = self._flat.new_empty(self._flat.shape[0], self._stacked.shape[0])
        return torch.split(self._grad_hidden, [up.shape[1] for up in self._ups], dim=1)[number]


def _gradients(
    part: Part,
    grad: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    matrices: tuple[Tensor, Tensor],
    grad_tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients by A (r, in) and B (out, r) from `grad` (..., out), that by the output.

    `tokens` (..., in) went in, `hidden` (..., r) is A times them. What A sends back is added into
    `grad_tokens` (..., in).
    """
    lora_a, lora_b = matrices
    # (..., out) to (N, out): the matmuls below sum over all N tokens.
    flat = grad.reshape(-1, grad.shape[-1]).to(part.dtype)
    grad_hidden = matmul(flat, lora_b.to(part.dtype)).mul_(part.scaling)  # (N, r)
    read = hidden.reshape(-1, hidden.shape[-1])
    grad_b = matmul_over_tokens(flat, read, part.scaling).to(lora_b.dtype)
    tokens, down = tokens.reshape(-1, tokens.shape[-1]), lora_a.to(part.dtype)
    if part.position is not None:
        into = None if grad_tokens is None else grad_tokens.view(tokens.shape)
        grad_a = _through_dropout(part, grad_hidden, tokens, down, into)
        return grad_a.to(lora_a.dtype), grad_b
    grad_a = matmul_over_tokens(grad_hidden, tokens.to(part.dtype)).to(lora_a.dtype)
    if grad_tokens is not None:
        _add_matmul(grad_tokens, grad_hidden, down, 1.0)
    return grad_a, grad_b


def _through_dropout(
    part: Part, grad_hidden: Tensor, tokens: Tensor, down: Tensor, grad_tokens: Tensor | None
) -> Tensor:
    """The gradient by A (r, in) in fp32, tile by tile: masks and what they leave are never whole.

    What A (r, in) sends back goes through the mask too: no matmul can add it to `grad_tokens`.
    """
    assert part.position is not None
    total: Tensor | None = None
    for number, rows in each_tile(tokens):
        tile = part.of_tile(part.position[2] + number)
        dropped = tile.dropped(tokens[rows]).to(part.dtype)
        by_tile = matmul_fp32(grad_hidden[rows].t(), dropped)
        total = by_tile if total is None else total.add_(by_tile)
        if grad_tokens is not None:
            grad_tokens[rows].add_(tile.dropped(matmul(grad_hidden[rows], down)))
    assert total is not None
    return total


def _add_matmul(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """`y += alpha * left @ right` in place; `y` (..., n), `left` (..., r), `right` (r, n)."""
    add_matmul(y.view(-1, y.shape[-1]), left.reshape(-1, left.shape[-1]), right, alpha)


def _number(parts: Sequence[Part], place: int) -> int:
    """Which of the adapted linears the one at `place` is."""
    return sum(bool(part.weights) for part in parts[:place])

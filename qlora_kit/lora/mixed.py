"""Rows of one batch with adapters of their own, or none: one forward, the base's products once.

The adapters of a mix lie in one matrix for each linear and dtype (`stack.py`). A step of few
tokens multiplies by all of them and blanks what is another row's: one matmul to the ranks, a mask,
one matmul added to the output. That reads each weight once, as any way must, and its products
with the other rows' adapters are few. A long prompt takes the rows' own A and B out of these
matrices, short ranks filled up with zeros, and multiplies row by row in one batched matmul each.
On a CPU so do the steps of rows that stay together, by copies that are kept: of 8 rows with 8
adapters of r 16 (160 M) a step's low-rank part took a third of the time then.

Matrices are made where a linear is first used, and take the bytes of their adapters once more.
Mixes of the same adapters share them: a row that leaves, or one more row of an adapter that is
there, costs some small tensors of places. Adapters that are no longer asked for stay in the
matrices while these have no more than `KEPT`, or than twice those asked for, so that rows which
come and go do not build them anew.

Left out: gradients.
Compare: Chen et al., Punica (arXiv 2310.18547); Sheng et al., S-LoRA (arXiv 2311.03285), whose
kernels gather A and B by pointers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_kit.device.target import device_type
from qlora_kit.errors import AdapterError
from qlora_kit.kernels.matmul import adapter_dtype, add_matmul, linear, matmul
from qlora_kit.lora.layer import LoRALinear
from qlora_kit.lora.low_rank import Part
from qlora_kit.lora.stack import OwnRows, Places, RowsRoom, Span, Stack
from qlora_kit.lora.switch import Active

KEPT = 8
"""Adapters that matrices may have where the rows ask for fewer."""
GATHERED = {"cpu": 16, "cuda": 256}
"""Tokens of a row, times the other adapters, from which its own A and B are taken out first.

Measured on a CPU; on CUDA by what a card reads and multiplies in the same time.
"""


@dataclass(frozen=True)
class RowsPart(Part):
    """A linear's base, and of each of so many rows its own adapter."""

    rows: int = 0
    stacks: tuple[tuple[Stack, Places, OwnRows], ...] = ()

    @property
    def has_update(self) -> bool:
        """Whether any row has one; `weights`, those of one adapter, are empty."""
        return bool(self.stacks)

    @property
    def by_row(self) -> bool:
        """It does: of a tile of tokens nothing says whose they are."""
        return True

    def add_to(self, y: Tensor, tokens: Tensor) -> None:
        """Add each row's update to the output (..., out_features) of tokens (..., in_features)."""
        x = self._by_row(tokens)
        most = GATHERED.get(device_type(x), GATHERED["cpu"])
        for stack, places, own in self.stacks:
            dtype = adapter_dtype(x, stack.lora_a.dtype)
            if x.shape[1] * (len(stack.spans) - 1) > most:
                by_row: tuple[Tensor, Tensor] | None = stack.of_rows(places, dtype)
            else:
                by_row = own.matrices(x)
            if by_row is not None:
                lora_a, lora_b = by_row
                dtype = lora_a.dtype
                # (B, r, T), which for one token is read faster, to (B, T, r)
                hidden = matmul(lora_a, x.to(dtype).transpose(1, 2)).transpose(1, 2)
                if places.scalings is not None:
                    hidden.mul_(places.scalings)
                add_matmul(y.view(*x.shape[:2], -1), hidden, lora_b, places.scaling)
                continue
            lora_a, lora_b = (matrix[:-1].to(dtype) for matrix in (stack.lora_a, stack.lora_b))
            # Filled, not multiplied by zero: another adapter's value may be infinite in fp16.
            hidden = linear(x.to(dtype), lora_a).masked_fill_(places.foreign, 0)  # (B, T, R)
            if places.scalings is not None:
                hidden.mul_(places.scalings)
            scaling = places.scaling
            if dtype is torch.float32:
                # Libraries may scale all of B first, where another's may overflow. In 16 bits they
                # scale the sums, which are in fp32, and A x might overflow.
                hidden.mul_(scaling)
                scaling = 1.0
            flat = hidden.view(-1, hidden.shape[-1])
            add_matmul(y.view(-1, y.shape[-1]), flat, lora_b, scaling)

    def _by_row(self, tokens: Tensor) -> Tensor:
        """`tokens` as (B, T, in_features).

        Some models' code hands them over as (B * T, in), low-rank attention as (B, 1, T, in).
        """
        by_row = tokens.dim() > 2 and tokens.shape[0] == self.rows
        if not by_row and (tokens.dim() != 2 or tokens.shape[0] % self.rows):
            raise AdapterError(
                f"a linear reads {tuple(tokens.shape)}, which are not the tokens of {self.rows} "
                "rows: rows with adapters of their own cannot share a batch in this model",
                "give each adapter a batch of its own",
            )
        return tokens.reshape(self.rows, -1, tokens.shape[-1])


@dataclass
class Stacks:
    """The adapters of a mix, and what is made of them linear by linear."""

    adapters: tuple[Active, ...]
    room: RowsRoom = field(default_factory=RowsRoom)
    made: dict[nn.Module, tuple[Stack, ...]] = field(default_factory=dict)
    layouts: dict[tuple[Span, ...], int] = field(default_factory=dict)

    def of(self, layer: LoRALinear) -> tuple[Stack, ...]:
        """Those of a linear, one for each dtype; made once."""
        if layer not in self.made:
            by_dtype: dict[torch.dtype, list[tuple[int, Part]]] = {}
            for number, adapter in enumerate(self.adapters):
                part = adapter.part(layer)
                if part is None:
                    continue
                if part.base is not layer.base_layer or part.position is not None:
                    raise AdapterError(
                        f"adapter {adapter.name!r} is merged or in training",
                        "give it a batch of its own",
                    )
                by_dtype.setdefault(part.dtype, []).append((number, part))
            self.made[layer] = tuple(Stack.of(one, self.layouts) for one in by_dtype.values())
        return self.made[layer]

    @property
    def held_bytes(self) -> int:
        """Of the matrices that are made."""
        return sum(stack.nbytes for stacks in self.made.values() for stack in stacks)


class Mixed:
    """Rows with adapters of their own as what takes part: an `Active` of `switch.py`.

    It is for batches of just these rows, in this order, and for frozen adapters: what they hold is
    copied once.
    """

    def __init__(self, stacks: Stacks, rows: Sequence[int]) -> None:
        self.stacks, self.rows = stacks, tuple(rows)
        """Of each row the number of its adapter, -1 for none."""
        self._parts: dict[nn.Module, RowsPart | None] = {}
        self._places: dict[int, Places | None] = {}

    @classmethod
    def of(
        cls, adapters_by_row: Sequence[Active | None], last: Stacks | None = None
    ) -> Active | None:
        """What takes part for rows with these adapters; one for all rows is that adapter itself.

        `last` are the stacks of a mix, used again as far as they have what these rows need.
        """
        needed = {id(one): one for one in adapters_by_row if one is not None}
        if len(needed) <= 1 and None not in adapters_by_row:
            return next(iter(needed.values()), None)
        if not needed:
            return None
        stacks = last or Stacks(())
        held = {id(one): one for one in stacks.adapters}
        if not needed.keys() <= held.keys() or len(held) > max(KEPT, 2 * len(needed)):
            kept = [one for key, one in held.items() if key not in needed]
            room = max(0, KEPT - len(needed))
            stacks = Stacks((*kept[max(0, len(kept) - room) :], *needed.values()), stacks.room)
        numbers = {id(one): number for number, one in enumerate(stacks.adapters)}
        return cls(stacks, [-1 if one is None else numbers[id(one)] for one in adapters_by_row])

    @property
    def name(self) -> str:
        """The adapters of the rows, for messages."""
        names = [self.stacks.adapters[row].name if row >= 0 else "none" for row in self.rows]
        return f"by row: {', '.join(names)}"

    def part(self, layer: nn.Module) -> Part | None:
        """What a linear computes with; None where no row has an adapter on it.

        Errors: `AdapterError` where a graph would be made.
        """
        if torch.is_grad_enabled():
            raise AdapterError(
                "rows with adapters of their own are computed without gradients",
                "use torch.no_grad(), or one adapter for the whole batch",
            )
        if layer not in self._parts:
            assert isinstance(layer, LoRALinear)
            self._parts[layer] = self._part(layer)
        return self._parts[layer]

    def _part(self, layer: LoRALinear) -> RowsPart | None:
        found = []
        for stack in self.stacks.of(layer):
            if stack.layout not in self._places:
                self._places[stack.layout] = Places.of(stack, self.rows)
            if (places := self._places[stack.layout]) is not None:
                found.append((stack, places, OwnRows(stack, places, self.stacks.room)))
        if not found:
            return None
        return RowsPart(layer.base_layer, rows=len(self.rows), stacks=tuple(found))

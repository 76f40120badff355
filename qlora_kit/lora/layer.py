"""LoRALinear: a frozen linear in 16, 8 or 4 bits with a trained low-rank update.

    y = W x + b + scaling * B (A dropout(x))

Two nodes of the graph compute the products of all linears that read the same rows (q, k and v; gate
and up), with their adapters and with the norm or the gated activation in front of them. The
low-rank part comes first, and the update is added into the base product in place. For backward it
keeps the input once, A x of each adapter, nothing of W; normalized, gated and dropped-out rows are
made again. `lora_A` and `lora_B` are fp32 masters; copies in the adapter dtype compute, made where
they are read. One pass over the 1b shape casts for 0.5 ms; copies kept through a step would hold 2
bytes a parameter, and an optimizer that writes past torch would leave them stale.

Module and parameter names are PEFT's: `base_layer`, `lora_A.<adapter>.weight` (r, in_features),
`lora_B.<adapter>.weight` (out_features, r).
Source: Hu et al., LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.base.linear import base_grad_input, base_matmul
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.kernels.matmul import add_matmul, linear, matmul
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.swiglu import Gate

Before = FrozenNorm | Gate
"""What stands in front of linears, and is made again in backward."""


class KeyedDropout(nn.Module):
    """Dropout whose mask follows from seed, layer, step and micro-step alone.

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
    def position(self) -> tuple[int, int] | None:
        """Where masks are drawn for now; None where nothing is dropped."""
        return self._position if self.training and self.p else None

    def at(self, position: tuple[int, int] | None, x: Tensor) -> Tensor:
        """Drop out `x`, or its gradient, with the mask of a `position`."""
        if position is None:
            return x
        step, micro_step = position
        digest = hashlib.sha256(f"{self._key} {step} {micro_step}".encode()).digest()
        generator = torch.Generator(device=x.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p, generator=generator)
        return x * keep * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}"


class LoRALinear(nn.Module):
    """A linear with adapters by name, of which one or none is active."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.adapter_dtypes: dict[str, torch.dtype] = {}
        self.configs: dict[str, LoRAConfig] = {}
        """Of each adapter the options, whose r and alpha a layer may have otherwise."""
        self.active: str | None = None
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def add_adapter(
        self, name: str, r: int, scaling: float, dtype: torch.dtype, dropout: KeyedDropout
    ) -> None:
        """Add fp32 masters on the base layer's device: A drawn, B zero, so that nothing changes.

        A is drawn from the global generator as PEFT draws it (Kaiming uniform, a = sqrt(5)).
        """
        device = self.base_layer.weight.device
        down = nn.Linear(self.in_features, r, bias=False, device="cpu", dtype=torch.float32)
        up = nn.Linear(r, self.out_features, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for held, matrix in ((self.lora_A, down), (self.lora_B, up)):
            # Not Module.to, which refuses fake tensors (torch 2.13).
            matrix.weight = nn.Parameter(matrix.weight.detach().to(device))
            held[name] = matrix
        self.lora_dropout[name] = dropout
        self.scaling[name], self.adapter_dtypes[name] = scaling, dtype
        self.active = name

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter; the base alone is left active if it was the active one."""
        for held in (self.lora_A, self.lora_B, self.lora_dropout):
            del held[name]
        for said in (self.scaling, self.adapter_dtypes, self.configs):
            said.pop(name, None)  # type: ignore[attr-defined]
        if self.active == name:
            self.active = None

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The masters A (r, in_features) and B (out_features, r) of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to (..., out_features) in the dtype of `x`."""
        if self.active is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        return linears((x,), [self])[0]


def delta_weight(layer: LoRALinear, name: str) -> Tensor:
    """The dense update `scaling * B @ A` in fp32, (out_features, in_features).

    It is computed from what training multiplied by: A and B rounded to the adapter dtype.
    """
    lora_a, lora_b = layer.weights(name)
    dtype = layer.adapter_dtypes[name]
    a, b = (w.detach().to(dtype).float() for w in (lora_a, lora_b))
    return (b @ a).mul_(layer.scaling[name])


def linears(
    inputs: Sequence[Tensor], layers: Sequence[nn.Module], before: Before | None = None
) -> tuple[Tensor, ...]:
    """The outputs (..., out_features) of linears that read the same rows (..., in_features).

    The rows are the one input, or what `before` makes of the inputs, which is not kept. The layers
    are frozen linears in any number of bits, with or without an adapter.
    """
    parts = tuple(_Part.of(layer) for layer in layers)
    weights = [weight for part in parts for weight in part.weights]
    read = _Read(parts, before, len(inputs))
    tie = _Keep.apply(read, *inputs, *weights)  # type: ignore[no-untyped-call]
    return _Linears.apply(read, tie, *inputs, *weights)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Part:
    """One linear of a group: its base, and what its active adapter computes with."""

    base: nn.Linear
    weights: tuple[nn.Parameter, ...] = ()
    scaling: float = 1.0
    dtype: torch.dtype = torch.float32
    dropout: KeyedDropout | None = None
    position: tuple[int, int] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> _Part:
        name = getattr(layer, "active", None)
        if name is None:
            return cls(getattr(layer, "base_layer", layer))  # type: ignore[arg-type]
        assert isinstance(layer, LoRALinear)
        dropout: KeyedDropout = layer.lora_dropout[name]  # type: ignore[assignment]
        dtype, scaling = layer.adapter_dtypes[name], layer.scaling[name]
        return cls(layer.base_layer, layer.weights(name), scaling, dtype, dropout, dropout.position)

    def dropped(self, x: Tensor) -> Tensor:
        """`x`, or its gradient, through the mask of the forward pass."""
        return x if self.dropout is None else self.dropout.at(self.position, x)


@dataclass
class _Read:
    """What linears that read the same rows share: `node` keeps for backward what `_Keep` gave it.

    The rows come of `count` inputs; `rows` and `low_rank` are handed from one forward to the other.
    """

    parts: tuple[_Part, ...]
    before: Before | None
    count: int
    node: Any = None
    rows: Tensor | None = None
    low_rank: Sequence[Tensor] = ()


class _Keep(torch.autograd.Function):
    """Low-rank products, and all that backward needs, before any base product is made.

    A node by itself, for tensors are kept when a forward ends: so a replay that wants them back
    ends here, and the last product of what is replayed is not made again. Its result is empty; it
    only ties `_Linears` to it.
    """

    @staticmethod
    def forward(ctx: Any, read: _Read, *tensors: Tensor) -> Tensor:
        inputs = tensors[: read.count]
        rows, kept = (inputs[0] if read.before is None else None), None
        if read.before is not None and (read.before.keeps or any(p.weights for p in read.parts)):
            rows, kept = read.before.apply(*inputs)
        # Else the product makes the rows, which a replay that ends here does not come to.
        low_rank = []
        for part in read.parts:
            if part.weights:
                assert rows is not None
                lora_a = part.weights[0].to(part.dtype)
                low_rank.append(linear(part.dropped(rows).to(part.dtype), lora_a))
        ctx.save_for_backward(kept, *inputs, *low_rank, *tensors[read.count :])
        ctx.set_materialize_grads(False)
        read.node, read.rows, read.low_rank = ctx, rows, low_rank
        return inputs[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Linears(torch.autograd.Function):
    """`W_i n + b_i + scaling_i * B_i A_i n` for n = before(*inputs), as one node."""

    @staticmethod
    def forward(ctx: Any, read: _Read, tie: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, low_rank = read.rows, iter(read.low_rank)
        if rows is None:
            assert read.before is not None
            rows, _ = read.before.apply(*tensors[: read.count])
        outputs = []
        for part in read.parts:
            y = base_matmul(part.base, rows)
            if part.weights:
                lora_b = part.weights[1].to(part.dtype)
                _add_product(y, next(low_rank), lora_b.t(), part.scaling)
            outputs.append(y)
        read.rows, read.low_rank = None, ()
        ctx.read = read
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        read: _Read = ctx.read
        parts, before = read.parts, read.before
        kept, *saved = read.node.saved_tensors
        inputs, saved = saved[: read.count], saved[read.count :]
        adapted = sum(bool(part.weights) for part in parts)
        low_rank, weights = iter(saved[:adapted]), iter(saved[adapted:])
        rows = inputs[0]
        if before is not None and adapted:
            rows = before.recompute(*inputs, kept=kept)
        grad_rows: Tensor | None = None
        grad_weights: list[Tensor | None] = []
        for part, grad in zip(parts, grads, strict=True):
            if part.weights:
                hidden, matrices = next(low_rank), (next(weights), next(weights))
            if grad is None:
                grad_weights += [None] * len(part.weights)
                continue
            if any(ctx.needs_input_grad[2 : 2 + read.count]):
                grad_rows = base_grad_input(part.base, grad, grad_rows)
            if part.weights:
                grad_weights += _adapter_grads(part, grad, rows, hidden, matrices, grad_rows)
        grad_inputs: Sequence[Tensor | None] = (grad_rows,)
        if before is not None:
            del rows  # before the gradients by the inputs come
            grad_inputs = [None] * read.count
            if grad_rows is not None:
                grad_inputs = before.backward(grad_rows, *inputs, kept=kept)
        return None, None, *grad_inputs, *grad_weights


def _adapter_grads(
    part: _Part,
    grad: Tensor,
    rows: Tensor,
    hidden: Tensor,
    matrices: tuple[Tensor, Tensor],
    grad_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients by A and B from that by the output; what A sends back joins `grad_rows`.

    `rows` (..., in_features) went in, `hidden` (..., r) is their product with A.
    """
    lora_a, lora_b = matrices
    # (..., out) to (N, out): the products below sum over every token.
    flat = grad.reshape(-1, grad.shape[-1]).to(part.dtype)
    grad_hidden = matmul(flat, lora_b.to(part.dtype)).mul_(part.scaling)
    low = part.dropped(rows).reshape(-1, rows.shape[-1]).to(part.dtype)
    grad_a = matmul(grad_hidden.t(), low).to(lora_a.dtype)
    grad_b = matmul(flat.t(), hidden.reshape(-1, hidden.shape[-1])).to(lora_b.dtype)
    if grad_rows is not None and part.position is None:
        _add_product(grad_rows, grad_hidden, lora_a.to(part.dtype), 1.0)
    elif grad_rows is not None:
        grad_low = matmul(grad_hidden, lora_a.to(part.dtype)).view(grad_rows.shape)
        grad_rows.add_(part.dropped(grad_low))
    return grad_a, grad_b.mul_(part.scaling)


def _add_product(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """`y += alpha * left @ right` in place; `y` (..., n), `left` (..., r), `right` (r, n)."""
    rows = y.view(-1, y.shape[-1])
    add_matmul(rows, left.reshape(-1, left.shape[-1]), right, alpha)

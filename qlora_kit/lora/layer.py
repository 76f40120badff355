"""LoRALinear: a frozen linear in 16, 8 or 4 bits with a trained low-rank update.

    y = W x + b + scaling * B (A dropout(x))

One function, `linears`, computes all linears that read the same tokens (q, k and v; gate and up),
with their adapters and with the norm or the gated activation before them. For backward it keeps the
input once, A x of each adapter, nothing of W; normalized, gated and dropped-out tokens are
recomputed. `lora_A` and `lora_B` are fp32 masters, cast to the adapter dtype where they are read.
One pass over the 1b shape casts for 0.5 ms; copies kept through a step would hold 2 bytes a
parameter, and an optimizer that writes past torch would leave them stale.

Module and parameter names are PEFT's: `base_layer`, `lora_A.<adapter>.weight` (r, in_features),
`lora_B.<adapter>.weight` (out_features, r).
Source: Hu et al., LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.base.resident import device_of
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.low_rank import LowRank, Part, together
from qlora_kit.lora.passes import Before, backward_through, outputs_of
from qlora_kit.lora.switch import Switch


class LoRALinear(nn.Module):
    """A linear with trained adapters by name; `switch`, the model's one, says which takes part."""

    def __init__(self, base_layer: nn.Linear, switch: Switch | None = None) -> None:
        super().__init__()
        self.switch = switch or Switch()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.adapter_dtypes: dict[str, torch.dtype] = {}
        self.configs: dict[str, LoRAConfig] = {}
        """Of each adapter the options, whose r and alpha a layer may have otherwise."""
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def add_adapter(
        self, name: str, r: int, scaling: float, dtype: torch.dtype, dropout: KeyedDropout
    ) -> None:
        """Add fp32 masters on the base layer's device: A drawn, B zero, so that nothing changes.

        The adapter takes part from then on, in all layers of the switch that have it. Masters of a
        base without weights are on the CPU. A is drawn from the global generator as PEFT draws it
        (Kaiming uniform, a = sqrt(5)).
        """
        device = device_of(self.base_layer)
        device = torch.device("cpu") if device.type == "meta" else device
        down = nn.Linear(self.in_features, r, bias=False, device="cpu", dtype=torch.float32)
        up = nn.Linear(r, self.out_features, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for held, matrix in ((self.lora_A, down), (self.lora_B, up)):
            # Not Module.to, which refuses fake tensors (torch 2.13).
            matrix.weight = nn.Parameter(matrix.weight.detach().to(device))
            held[name] = matrix
        self.lora_dropout[name] = dropout.train(self.training)
        self.scaling[name], self.adapter_dtypes[name] = scaling, dtype
        self.switch.active = Masters(name)

    def remove_adapter(self, name: str) -> None:
        """Drop the masters of an adapter: this layer is the base where it would take part."""
        for held in (self.lora_A, self.lora_B, self.lora_dropout):
            del held[name]
        for said in (self.scaling, self.adapter_dtypes, self.configs):
            said.pop(name, None)  # type: ignore[attr-defined]

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The masters A (r, in_features) and B (out_features, r) of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to (..., out_features) in the dtype of `x`."""
        if self.switch.active is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        return linears((x,), [self])[0]


@dataclass(frozen=True)
class Masters:
    """A trained adapter as what takes part: an `Active` of `switch.py`."""

    name: str

    def part(self, layer: nn.Module) -> Part | None:
        """The masters of a layer, where it has them."""
        if not isinstance(layer, LoRALinear) or self.name not in layer.lora_A:
            return None
        dropout: KeyedDropout = layer.lora_dropout[self.name]  # type: ignore[assignment]
        dtype, scaling = layer.adapter_dtypes[self.name], layer.scaling[self.name]
        weights = layer.weights(self.name)
        return Part(layer.base_layer, weights, scaling, dtype, dropout, dropout.position)


def linears(
    inputs: Sequence[Tensor],
    layers: Sequence[nn.Module],
    before: Before | None = None,
    *,
    ready: list[Tensor] | None = None,
    residual: bool = False,
) -> tuple[Tensor, ...]:
    """The outputs (..., out_features) of linears that read the same tokens (..., in_features).

    The tokens are the one input, or `before` of the inputs, which is not kept. The layers are
    frozen linears in any number of bits, with or without an adapter. `ready` is what `before.apply`
    gives, where it has been computed, and is empty afterwards. With `residual` the one input of a
    norm comes back as the last output, for what else reads it: the norm's backward adds that
    gradient to its own.

    Two nodes of the graph, because of recomputation. torch's checkpoint runs a forward again in
    backward until all that it kept the first time is there again, and a node's tensors are kept
    when its forward returns. In one node the base matmuls, which are nearly all of the work, would
    come before that, and a replay would run them even where nothing reads their results: those of
    the last linears of what is replayed. So `_Keep` computes what backward needs, which is little,
    and keeps it; `_Linears` runs the base matmuls and keeps nothing. A replay that ends with these
    linears stops between the two.
    """
    parts = tuple(part_of(layer) for layer in layers)
    if not torch.is_grad_enabled():
        outputs = _without_graph(inputs, parts, before, ready)
        return (*outputs, inputs[0]) if residual else outputs
    weights = [weight for part in parts for weight in part.weights]
    group = _Group(parts, before, len(inputs), tuple(ready or ()), residual)
    if ready is not None:
        ready.clear()  # whoever made it holds the list for longer
    tie = _Keep.apply(group, *inputs, *weights)  # type: ignore[no-untyped-call]
    return _Linears.apply(group, tie, *inputs, *weights)  # type: ignore[no-any-return, no-untyped-call]


def part_of(layer: nn.Module) -> Part:
    """A linear's base, and what takes part beside it."""
    if not isinstance(layer, LoRALinear):
        return Part(layer)  # type: ignore[arg-type]
    active = layer.switch.active
    part = None if active is None else active.part(layer)
    return part or Part(layer.base_layer)


def _without_graph(
    inputs: Sequence[Tensor],
    parts: Sequence[Part],
    before: Before | None,
    ready: list[Tensor] | None,
) -> tuple[Tensor, ...]:
    """The outputs where no backward follows: nothing is kept, and no node is made."""
    if ready:
        tokens = ready[0]
        ready.clear()
    else:
        tokens = inputs[0] if before is None else before.apply(*inputs)[0]
    low_rank = LowRank.of(parts, tokens) if together(parts, tokens) else None
    return tuple(outputs_of(parts, tokens, low_rank))


@dataclass
class _Group:
    """What linears that read the same tokens share, and what `_Keep` hands to `_Linears`.

    `node` is the context of `_Keep`, where backward finds what is kept. `tokens` (..., in_features)
    and `low_rank`, A x (..., r) of each adapter, go from one forward to the other and no further,
    and so does `ready` to the first.
    """

    parts: tuple[Part, ...]
    before: Before | None
    num_inputs: int
    ready: tuple[Tensor, ...]
    residual: bool
    node: Any = None
    tokens: Tensor | None = None
    low_rank: LowRank | None = None


class _Keep(torch.autograd.Function):
    """Computes A x of each adapter, and keeps all that backward needs.

    Kept, in this order: what `before` keeps besides its inputs (or None), the inputs, A x (..., r)
    of each adapter, and the masters A and B of each. The result is empty and has no gradient: it
    only ties `_Linears` to this node, so that what is kept lives as long as the graph.
    """

    @staticmethod
    def forward(ctx: Any, group: _Group, *tensors: Tensor) -> Tensor:
        inputs, before = tensors[: group.num_inputs], group.before
        tokens, kept = (inputs[0] if before is None else None), None
        if group.ready:
            tokens, kept = group.ready
        elif before is not None and (before.keeps or any(p.weights for p in group.parts)):
            tokens, kept = before.apply(*inputs)
        # Else `_Linears` computes the tokens, which a replay that ends here does not come to.
        low_rank = LowRank.of(group.parts, tokens)
        ctx.save_for_backward(kept, *inputs, *low_rank.hidden, *tensors[group.num_inputs :])
        ctx.set_materialize_grads(False)
        group.ready, group.node, group.tokens, group.low_rank = (), ctx, tokens, low_rank
        return inputs[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Linears(torch.autograd.Function):
    """`W_i n + b_i + scaling_i * B_i A_i n` for tokens n = before(*inputs), as one node.

    The update is added into the result of the base matmul in place. Backward sums the gradients by
    the tokens over all linears in one tensor, and then goes through `before`.
    """

    @staticmethod
    def forward(ctx: Any, group: _Group, tie: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, low_rank = group.tokens, group.low_rank
        if tokens is None:
            assert group.before is not None
            tokens, _ = group.before.apply(*tensors[: group.num_inputs])
        outputs = outputs_of(group.parts, tokens, low_rank)
        group.tokens = group.low_rank = None
        ctx.group = group
        ctx.set_materialize_grads(False)
        return (*outputs, tensors[0]) if group.residual else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        kept, *saved = group.node.saved_tensors
        inputs, saved = saved[: group.num_inputs], saved[group.num_inputs :]
        needed = any(ctx.needs_input_grad[2 : 2 + group.num_inputs])
        outputs = grads[:-1] if group.residual else grads
        residual = grads[-1] if group.residual else None
        given = group.parts, group.before, inputs, kept, saved
        grad_inputs, grad_weights = backward_through(*given, outputs, needed, residual)
        return None, None, *grad_inputs, *grad_weights

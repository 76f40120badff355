"""What linears that read the same tokens compute with their adapters: outputs, and gradients.

Without a graph: `layer.py` makes nodes of it for all tokens, `tiles.py` one for tile after tile.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_kit.base.linear import base_grad_input, base_matmul
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.lora.low_rank import LowRank, LowRankBackward, Part

Before = FrozenNorm | Gate
"""What comes before linears, and is recomputed in backward."""


def outputs_of(parts: Sequence[Part], tokens: Tensor, low_rank: LowRank | None) -> list[Tensor]:
    """What linears with their adapters make of tokens (..., in_features): (..., out_features).

    Without `low_rank` each adapter computes its update by itself, and keeps nothing of it.
    """
    outputs = []
    for place, part in enumerate(parts):
        y = base_matmul(part.base, tokens)
        if low_rank is not None:
            low_rank.add_to(y, place)
        elif part.has_update:
            part.add_to(y, tokens)
        outputs.append(y)
    return outputs


def backward_through(
    parts: Sequence[Part],
    before: Before | None,
    inputs: Sequence[Tensor],
    kept: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: bool = True,
    residual: Tensor | None = None,
) -> tuple[Sequence[Tensor | None], list[Tensor | None]]:
    """The gradients by the inputs of linears, where `needed`, and by A and B of each adapter.

    `grads` (..., out_features) are those by the outputs, `saved` is A x of each adapter and then
    the masters A and B of each. `residual` is the gradient by another use of a norm's input.
    """
    adapted = sum(bool(part.weights) for part in parts)
    tokens = inputs[0]
    if before is not None and adapted:
        tokens = before.recompute(*inputs, kept=kept)  # type: ignore[arg-type]
    update = LowRankBackward(parts, tokens, saved[:adapted], saved[adapted:])
    grad_tokens: Tensor | None = None  # (..., in_features), the sum over the parts
    for place, (part, grad) in enumerate(zip(parts, grads, strict=True)):
        if grad is None:
            continue
        if needed:
            grad_tokens = base_grad_input(part.base, grad, grad_tokens)
        update.take(place, grad, grad_tokens)
    grad_weights = update.gradients(grad_tokens)
    if before is None:
        return (grad_tokens,), grad_weights
    del tokens, update  # before the gradients by the inputs come
    also = {} if residual is None else {"residual": residual}
    grad_inputs: Sequence[Tensor | None] = [*also.values()] or [None] * len(inputs)
    if grad_tokens is not None:
        grad_inputs = before.backward(grad_tokens, *inputs, kept=kept, **also)  # type: ignore[arg-type]
    return grad_inputs, grad_weights

"""Carries out which activations of a decoder layer are kept for backward, or recomputed.

Kept by a layer of ours at each level, for T tokens, hidden h, query width a (heads x head size) and
n heads, in 16 bits, in bytes:

    full        2Th                     the layer's input
    selective   4Th + 2Ta + 4Tn         and the middle residual, attention's output and statistics
    none        what `lora/block.py` lists

`full` runs the layer again in backward. `selective` runs its two halves again, each by itself and
without attention: the replay of attention's half ends before its output projection, that of the
MLP's before its last one, where no norm reads what these give. Our own forward of attention
(`kernels/attention.py`) has no statistics. Attention that is not one kernel (soft caps) has nothing
to keep and is made again; so is that of a base with dropout of its own.

A layer that runs through the model's own code keeps 2Th at `full`, and its input with attention's
output and statistics, 2Th + 2Ta + 4Tn, at `selective`.

Replays are torch's checkpoint, non-reentrant, stopped as soon as the last needed tensor is there.
Dropout of adapters is keyed, so nothing random has to be saved for the second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qlora_kit.kernels.attention import ATTEND_IN_BLOCKS, ATTEND_ROWS
from qlora_kit.lora.block import Block, OwnForward

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ATTEND_IN_BLOCKS,
    ATTEND_ROWS,
}
"""The kernels whose results `selective` keeps."""


def set_recompute(model: Any, levels: str | Sequence[str]) -> None:
    """Set the decoder layers of `model` to `none`, `selective` or `full`, all or each to its own.

    Outputs and gradients are equal bit for bit, whatever the levels.
    """
    layers = list(model.base_model.layers)
    chosen = [levels] * len(layers) if isinstance(levels, str) else list(levels)
    for layer, level in zip(layers, chosen, strict=True):
        forward = layer.forward
        if isinstance(forward, _Recomputed):
            forward = forward.kept
        layer.forward = _at_level(layer, forward, level, _draws(model.config, layer))


def _draws(config: Any, layer: nn.Module) -> bool:
    """Whether a layer draws from torch's own generator: a base with dropout in it."""
    dropouts = (one.p for one in layer.modules() if isinstance(one, nn.Dropout))
    return any((getattr(config, "attention_dropout", 0), *dropouts))


@dataclass(frozen=True)
class _Recomputed:
    """A layer's forward that keeps less while it trains; `kept` is the one that keeps all."""

    layer: nn.Module
    kept: Callable[..., Any]
    training: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.layer.training and torch.is_grad_enabled()
        return (self.training if trains else self.kept)(*args, **kwargs)


def _at_level(
    layer: nn.Module, forward: Callable[..., Any], level: str, random: bool
) -> Callable[..., Any]:
    if level == "none":
        return forward
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    if level == "full":
        return _Recomputed(layer, forward, partial(again, forward))
    # Attention that is not run again does not draw either, and what follows it would draw others.
    without_attention = again if random else partial(again, context_fn=_kept_attention)
    if not isinstance(forward, OwnForward):
        return _Recomputed(layer, forward, partial(without_attention, forward))
    halves = replace(
        forward,
        original=partial(without_attention, forward.original),
        run=partial(_halves, again, not random),
    )
    return _Recomputed(layer, forward, halves)


def _halves(
    again: Callable[..., Any],
    keeps_attention: bool,
    block: Block,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """As `Block.forward`, each half to be run again by itself."""
    # Around attention alone: such a context looks at every operation inside, in Python.
    keeping, kept = _kept_attention() if keeps_attention else (nullcontext(), nullcontext())
    contexts = [keeping]

    def attention_half(x: Tensor) -> Tensor:
        around = contexts.pop() if contexts else kept
        return block.attention_half(x, position_embeddings, attention_mask, options, around)

    middle: Tensor = again(attention_half, hidden_states)
    result: Tensor = again(block.mlp_half, middle)
    return result


def _kept_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A context that keeps what attention's kernels give, and one that gives it back, in order."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return contexts


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = operation in ATTENTION
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

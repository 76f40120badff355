"""Carries out which activations of a decoder layer are kept for backward, or recomputed.

`none` keeps what every operation saves. `full` keeps a layer's input only and runs the layer
again in backward (torch's checkpoint, non-reentrant, stopped as soon as the last needed tensor is
there). Dropout of adapters is keyed, so nothing random has to be saved for the second run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def set_recompute(model: Any, level: str) -> None:
    """Set every decoder layer of `model` to `none` or `full`; the results are equal bit for bit."""
    # A base with dropout in its attention draws from torch's own generator.
    random = bool(getattr(model.config, "attention_dropout", 0))
    for layer in model.base_model.layers:
        forward = layer.forward
        if isinstance(forward, functools.partial) and forward.func is _recomputed:
            layer.forward = forward = forward.args[1]
        if level == "full":
            layer.forward = functools.partial(_recomputed, layer, forward, random)


def _recomputed(
    layer: nn.Module, forward: Callable[..., Any], random: bool, *args: Any, **kwargs: Any
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)

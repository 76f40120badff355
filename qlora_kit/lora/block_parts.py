"""What a decoder layer is made of, found by names and outputs and not by its class."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base.architecture import ARCHITECTURES
from qlora_kit.device import has_values
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.swiglu import ACTIVATIONS


def norm_of(module: Any) -> FrozenNorm | None:
    """The norm that gives the numbers of `module`, or None where neither style does.

    Which style a module follows is found by comparing outputs, not by its class.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if not has_values(weight):
        # A plan has no numbers; which style it is depends on the code alone.
        with unset_fake_temporarily():
            like = copy.copy(module)
            like._parameters = {"weight": nn.Parameter(torch.ones(weight.shape) + 0.5)}
            like.to(weight.dtype)
            norm = norm_of(like)
        return None if norm is None else replace(norm, weight=weight)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.numel(), generator=drawn).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = module(x)
        for from_zero in (False, True):
            norm = FrozenNorm(weight, eps, from_zero)
            if torch.equal(norm.apply(x)[0], expected):
                return norm
    return None


def has_projections(attention: Any, mlp: Any) -> bool:
    """Whether a layer has the projections that its architecture's record names."""
    known = ARCHITECTURES.get(attention.config.model_type)
    if known is None:
        return False
    of_attention = all(hasattr(attention, name) for name in (*known.query_key_value, "o_proj"))
    return of_attention and all(hasattr(mlp, name) for name in (*known.gate_up, "down_proj"))


def activation(config: Any) -> str | None:
    """The gated MLP's activation by name, None where there is no kernel for it."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if name in ACTIVATIONS else None


def window(attention: Any) -> int | None:
    """The sliding window of a layer, where it has one."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if getattr(attention, "layer_type", "full_attention") == "full_attention":
        return getattr(attention.config, "sliding_window", None)
    return None


def eager_attention(attention: nn.Module) -> Any:
    """The plain attention of a model's own module, which no registry holds."""
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)

"""The attention of decoding steps: the library's, but for one query a row in 16 bits on a CPU.

It takes the place of transformers' function for `sdpa` once and for all threads, and does what that
does outside of a step: each thread that put one there and back would find another's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_kit.device.target import set_inside
from qlora_kit.kernels.attention_step import attend_one, is_step

_IN_STEP: ContextVar[bool] = ContextVar("in_step", default=False)


def attending_in_step() -> AbstractContextManager[None]:
    """Inside, attention of one query a row is computed as a step's."""
    return set_inside(_IN_STEP, True)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: (B, H, T, d) to (B, T, H, d)."""
    # torch (2.13) compiles no read of a ContextVar.
    in_step = not torch.compiler.is_compiling() and _IN_STEP.get()
    others = ("softcap", "position_bias", "cache")
    if (
        not in_step
        or dropout
        or any(options.get(name) is not None for name in others)
        or not is_step(query, key, value)
    ):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_one(query, key, value, attention_mask, scale), None


AttentionInterface.register("sdpa", _attend)

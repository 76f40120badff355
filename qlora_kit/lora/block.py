"""A fused decoder block: the model's numbers from nodes that keep the least for backward.

Kept without recompute, for T tokens, hidden h, kv = kv heads x head size, ffn f, rank r:

    x (T, h) and its norm's scale; q (T, h), k, v (T, kv each) after the rotary embedding;
    attention's output (T, h) where its backward or an adapter on the output projection reads it,
    and where its backward does, a statistic (4 bytes) of every token and head; the middle residual
    (T, h) and its norm's scale; gate and up (T, f each); the low-rank activation (T, r) of every
    adapted linear; what further norms read (of heads, after attention and MLP), with their scales.

Normalized tokens, the gated activation and all dequantized weights are recomputed in backward. A
block is found by the structure of a model's layer, after one comparison of its output with ours on
random input; a layer whose output differs keeps its own code (`training/layer_forward.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.base.architecture import ARCHITECTURES
from qlora_kit.kernels.rmsnorm import FrozenNorm, normalize
from qlora_kit.kernels.rotary import rotate
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.lora.block_parts import (
    activation,
    eager_attention,
    has_projections,
    norm_of,
    window,
)
from qlora_kit.lora.layer import linears


@dataclass(frozen=True)
class Block:
    """The parts of a decoder layer, found by name; `after` norms follow attention and MLP."""

    layer: Any
    attention: Any
    before: tuple[FrozenNorm, FrozenNorm]
    after: tuple[FrozenNorm, FrozenNorm] | None
    head_norms: tuple[FrozenNorm, FrozenNorm] | None
    gate: Gate
    residual_scale: float

    @classmethod
    def of(cls, layer: Any) -> Block | None:
        """The parts of `layer`, or None where something is missing or more than expected."""
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None or not has_projections(attention, mlp):
            return None
        first, second = "input_layernorm", "post_attention_layernorm"
        names = [first, second]
        if hasattr(layer, "pre_feedforward_layernorm"):
            names = [first, "pre_feedforward_layernorm", second, "post_feedforward_layernorm"]
        norms = [norm_of(getattr(layer, name, None) or nn.Identity()) for name in names]
        if hasattr(attention, "q_norm") != hasattr(attention, "k_norm"):
            return None
        heads = [
            norm_of(getattr(attention, name))
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        ]
        gated = activation(attention.config)
        dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout) and m.p]
        known = [norm for norm in (*norms, *heads) if norm is not None]
        if len(known) != len(norms) + len(heads) or gated is None or dropouts:
            return None
        return cls(
            layer,
            attention,
            (known[0], known[1]),
            (known[2], known[3]) if len(norms) == 4 else None,
            (known[-2], known[-1]) if heads else None,
            Gate(gated),
            getattr(layer, "residual_multiplier", 1.0),
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """`hidden_states` (B, T, h) to the next layer's."""
        x = self.attention_half(hidden_states, position_embeddings, attention_mask, options)
        return self.mlp_half(x)

    def attention_half(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
        around: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """The layer's input (B, T, h) to the middle residual; attention runs inside `around`."""
        around = around or nullcontext()
        return self._added(x, self._attend(x, position_embeddings, mask, options, around))

    def mlp_half(self, x: Tensor) -> Tensor:
        """The middle residual (B, T, h) to the next layer's input."""
        return self._added(x, self._mlp(x))

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.residual_scale == 1.0 else y * self.residual_scale)

    def _attend(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
        around: AbstractContextManager[Any],
    ) -> Tensor:
        attention = self.attention
        heads = (*x.shape[:-1], -1, attention.head_dim)  # (B, T, heads, d)
        names = ARCHITECTURES[attention.config.model_type].query_key_value
        parts = linears((x,), [getattr(attention, name) for name in names], self.before[0])
        if len(parts) == 1:
            (fused,) = parts
            groups = attention.num_key_value_groups
            kv = fused.shape[-1] // (groups + 2)
            queries, keys, values = torch.split(fused, [groups * kv, kv, kv], dim=-1)
            # (B, T, (groups + 2) * kv) into queries and keys and values of width kv. A view would
            # keep all of `fused` for backward; the rotary embeddings copy the other two.
            parts = (queries, keys, values.contiguous())
        q, k, v = (part.view(heads) for part in parts)  # (B, T, heads or kv heads, d)
        if self.head_norms is not None:
            q, k = normalize(self.head_norms[0], q), normalize(self.head_norms[1], k)
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention(attention)
        )
        if hasattr(attention, "attn_logit_softcapping"):
            options = {**options, "softcap": attention.attn_logit_softcapping}
        if (width := window(attention)) is not None:
            options = {**options, "sliding_window": width}
        with around:
            attended, _ = attend(
                attention,
                *(part.transpose(1, 2) for part in (q, k, v)),  # (B, heads, T, d)
                mask,
                dropout=attention.attention_dropout if attention.training else 0.0,
                scaling=attention.scaling,
                **options,
            )
        # (B, T, heads, d) to (B, T, heads * d), and through the output projection to (B, T, h).
        y: Tensor = attention.o_proj(attended.reshape(*x.shape[:-1], -1))
        return y if self.after is None else normalize(self.after[0], y)

    def _mlp(self, x: Tensor) -> Tensor:
        mlp = self.layer.mlp
        names = ARCHITECTURES[self.attention.config.model_type].gate_up
        layers = [getattr(mlp, name) for name in names]
        (y,) = linears(linears((x,), layers, self.before[1]), [mlp.down_proj], self.gate)
        return y if self.after is None else normalize(self.after[1], y)

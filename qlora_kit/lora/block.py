"""A fused decoder block: the model's numbers from nodes that keep the least for backward.

Kept without recompute, for T tokens, hidden h, kv = kv heads x head size, ffn f, rank r:

    x (T, h) and its norm's scale; q (T, h), k, v (T, kv each) after the rotary embedding;
    attention's output (T, h) where its backward or an adapter on the output projection reads it,
    and where its backward does, a statistic (4 bytes) of every token and head; the middle residual
    (T, h) and its norm's scale; gate and up (T, f each); the low-rank activation (T, r) of every
    adapted linear; what further norms read (of heads, behind attention and MLP), with their scales;
    a factor (T) of queries where they have one; with an embedding of the layer's own also the
    residual before it (T, h), its gate (T, e) and what its norm reads (T, h).

With a tiled MLP gate and up and what its norm behind reads are not kept either (`tiles.py`).

Normalized tokens, the gated activation and all dequantized weights are recomputed in backward. A
block is found by the structure of a model's layer, after one comparison of its output with ours on
random input; a layer whose output differs keeps its own code (`training/layer_forward.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.base.architecture import architecture_of
from qlora_kit.kernels.rmsnorm import FrozenNorm, add_and_normalize, normalize
from qlora_kit.kernels.rotary import rotate, rotate_both
from qlora_kit.kernels.swiglu import Gate
from qlora_kit.lora.block_parts import (
    OPTION,
    SharedKeys,
    activation,
    eager_attention,
    head_norms,
    norm_names,
    norm_of,
    per_layer_parts,
    projections,
    query_key_value,
    query_scale,
    rotation_of,
    unexplained,
    window,
)
from qlora_kit.lora.layer import linears, part_of
from qlora_kit.lora.tiles import TiledMlp, added_in_place, mlp_in_tiles, over_tiles

SCALAR = "layer_scalar"
"""What some families multiply a layer's output by, (1,)."""


@dataclass(frozen=True)
class Block:
    """The parts of a decoder layer, found by name; norms come before and behind both halves.

    `head_norms` are of queries, keys and values. `rotation` is what `rotation_of` says,
    `query_scale` the factor of queries by their positions, `shares` what the layer does with keys
    and values of others, `per_layer` the norm of the layer's own embedding. `tiled` says that the
    MLP goes over tiles of tokens, and that nothing wider than its input is kept of it (`tiles.py`).
    """

    layer: Any
    attention: Any
    before: tuple[FrozenNorm | None, FrozenNorm | None]
    after: tuple[FrozenNorm | None, FrozenNorm | None]
    head_norms: tuple[FrozenNorm | None, ...]
    gate: Gate
    residual_scale: float
    rotation: str
    query_scale: Callable[[Tensor], Tensor] | None
    shares: SharedKeys
    per_layer: FrozenNorm | None
    tiled: bool = False

    @classmethod
    def of(cls, layer: Any) -> Block | None:
        """The parts of `layer`, or None where something is missing or more than expected."""
        attention, names = getattr(layer, "self_attn", None), norm_names(layer)
        if attention is None or names is None or (linear_names := projections(layer)) is None:
            return None
        if (heads := head_norms(attention)) is None:
            return None
        *own, own_norm = per_layer_parts(layer) or [""]
        found = (*names, *(f"self_attn.{name}" for name in heads), own_norm)
        norms = {name: norm_of(layer.get_submodule(name)) for name in found if name}
        gated, rotation = activation(attention.config), rotation_of(attention)
        dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout) and m.p]
        if None in norms.values() or gated is None or rotation is None:
            return None
        if dropouts or unexplained(layer, (*norms, *linear_names, *own, SCALAR)):
            return None
        first, behind_first, second, behind_second = (norms.get(name or "") for name in names)
        return cls(
            layer,
            attention,
            (first, second),
            (behind_first, behind_second),
            tuple(norms.get(f"self_attn.{name}") for name in ("q_norm", "k_norm", "v_norm")),
            Gate(gated),
            getattr(layer, "residual_multiplier", 1.0),
            rotation,
            query_scale(attention),
            SharedKeys.of(layer),
            norms.get(own_norm),
        )

    @property
    def kind(self) -> tuple[object, ...]:
        """What sets a layer apart from others of the same code."""
        return window(self.attention), self.rotation

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        per_layer_input: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """`hidden_states` (B, T, h) to the next layer's; `per_layer_input` is (B, T, e)."""
        x, *ready = self._added_and_ready(
            *self._attend(
                hidden_states, position_embeddings, attention_mask, options, nullcontext()
            )
        )
        return self.mlp_half(x, per_layer_input, ready)

    def attention_half(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        options: dict[str, Any],
        around: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """The layer's input (B, T, h) to the middle residual; attention runs inside `around`."""
        around = around or nullcontext()
        return self._added(*self._attend(x, position_embeddings, mask, options, around))

    def mlp_half(
        self,
        x: Tensor,
        per_layer_input: Tensor | None = None,
        ready: list[Tensor] | None = None,
    ) -> Tensor:
        """The middle residual (B, T, h) to the next layer's input.

        `ready` is taken by the linears that read it.
        """
        x = self._mlp_in_tiles(x) if self.tiled else self._added(*self._mlp(x, ready))
        if self.per_layer is not None:
            assert per_layer_input is not None
            gate = linears((x,), [self.layer.per_layer_input_gate])[0]  # (B, T, e)
            (y,) = linears((gate, per_layer_input), [self.layer.per_layer_projection], self.gate)
            x = x + normalize(self.per_layer, y)
        scalar = getattr(self.layer, SCALAR, None)
        return x if scalar is None else x.mul_(scalar)

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return added_in_place(x, self._scaled(y)) if self.tiled else x + self._scaled(y)

    def _mlp_in_tiles(self, x: Tensor) -> Tensor:
        """The middle residual (B, T, h) and what the MLP adds to it, tile by tile."""
        gate_up, down = self.mlp_linears
        if not torch.is_grad_enabled():
            if any(part_of(one).by_row for one in (*gate_up, down)):
                return self._added(*self._mlp(x, None))
            return over_tiles(lambda _, tile, to: to.copy_(self._added(*self._mlp(tile, None))), x)
        norms = self.before[1], self.after[1]
        mlp = TiledMlp.of(norms, gate_up, self.gate, down, self.residual_scale)
        return mlp_in_tiles(mlp, x)

    @property
    def mlp_linears(self) -> tuple[list[nn.Module], nn.Module]:
        """Gate and up, or one linear of both, and the MLP's last one."""
        family = architecture_of(self.attention.config.model_type)
        mlp = getattr(self.layer, family.mlp)
        return [getattr(mlp, name) for name in family.gate_up], getattr(mlp, family.down)

    def _added_and_ready(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The middle residual, and what its norm gives, by one kernel where there is one."""
        norm = None if self.tiled else self.before[1]
        return (self._added(x, y),) if norm is None else add_and_normalize(norm, x, self._scaled(y))

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual_scale == 1.0 else y * self.residual_scale

    def _attend(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        options: dict[str, Any],
        around: AbstractContextManager[Any],
    ) -> tuple[Tensor, Tensor]:
        """The layer's input (B, T, h) for its residual, and what attention adds to it."""
        attention = self.attention
        shared, options = options.get(OPTION), {n: o for n, o in options.items() if n != OPTION}
        x, q, k, v = self._queries_keys_values(x, position_embeddings, shared, options)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention(attention)
        )
        if hasattr(attention, "attn_logit_softcapping"):
            options = {**options, "softcap": attention.attn_logit_softcapping}
        if (width := window(attention)) is not None:
            options = {**options, "sliding_window": width}
        if self.tiled:
            # It comes from the output projection and is read by attention alone.
            options = {**options, "spends_grad": True}
        with around:
            attended, _ = attend(
                attention,
                *(q, k, v),
                mask,
                dropout=attention.attention_dropout if attention.training else 0.0,
                scaling=attention.scaling,
                **options,
            )
        del q, k, v
        # (B, T, heads, d) to (B, T, heads * d), and through the output projection to (B, T, h).
        y: Tensor = attention.o_proj(attended.reshape(*x.shape[:-1], -1))
        return x, _normalized(self.after[0], y)

    def _queries_keys_values(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        shared: Any,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's input (B, T, h), and what attention reads: (B, heads or kv heads, T, d)."""
        attention, length = self.attention, x.shape[:-1]
        names = query_key_value(attention)
        x, parts = _read(x, [getattr(attention, name) for name in names], self.before[0])
        if len(parts) == 1 and not self.shares.reads:
            (fused,) = parts
            groups = attention.num_key_value_groups
            kv = fused.shape[-1] // (groups + 2)
            queries, *others = torch.split(fused, [groups * kv, kv, kv], dim=-1)
            # (B, T, (groups + 2) * kv) into queries and keys and values of width kv. A view would
            # keep all of `fused` for backward; the rotary embeddings copy the other two.
            parts = [queries, others[0], others[1].contiguous()]
        if len(parts) == 2:
            parts.append(parts[1])  # the keys are the values
        for place, norm in enumerate(self.head_norms[: len(parts)]):
            # Of each head, or (OLMo 2) of all of them at once.
            if norm is not None:
                width = attention.head_dim if norm.weight is None else norm.weight.numel()
                parts[place] = normalize(norm, parts[place].view(*length, -1, width))
        # (B, T, heads or kv heads, d)
        q, *heads = (part.view(*length, -1, attention.head_dim) for part in parts)
        if self.rotation != "none":
            assert position_embeddings is not None
            by_neighbours = self.rotation == "neighbours"
            if heads:
                q, heads[0] = rotate_both(q, heads[0], *position_embeddings, by_neighbours)
            else:
                q = rotate(q, *position_embeddings, by_neighbours)
        if self.query_scale is not None:
            q = q * self.query_scale(options["position_ids"]).to(q.dtype)
        if not self.shares.reads:
            k, v = (one.transpose(1, 2) for one in heads)
        else:
            k, v = shared[self.shares.kind]
        if self.shares.stores and shared is not None:
            shared[self.shares.kind] = (k, v)
        return x, q.transpose(1, 2), k, v

    def _mlp(self, x: Tensor, ready: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """The middle residual (B, T, h) for the sum, and what the MLP adds to it."""
        first, down = self.mlp_linears
        x, gate_up = _read(x, first, self.before[1], ready)
        (y,) = linears(gate_up, [down], self.gate)
        return x, _normalized(self.after[1], y)


def _read(
    x: Tensor,
    layers: Sequence[nn.Module],
    norm: FrozenNorm | None,
    ready: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`x` (B, T, h) for its residual, and the outputs of the linears that read it through a norm.

    Both gradients by `x` come together in the norm's backward.
    """
    if norm is None:
        return x, [*linears((x,), layers)]
    *outputs, x = linears((x,), layers, norm, ready=ready, residual=True)
    return x, outputs


def _normalized(norm: FrozenNorm | None, y: Tensor) -> Tensor:
    return y if norm is None else normalize(norm, y)

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

import copy
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.base.architecture import ARCHITECTURES
from qlora_kit.device import has_values
from qlora_kit.kernels.rmsnorm import FrozenNorm, normalize
from qlora_kit.kernels.rotary import rotate
from qlora_kit.kernels.swiglu import ACTIVATIONS, Gate
from qlora_kit.lora.layer import linears

COMPARED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative; both sides do the same operations, a matmul of other width may round otherwise."""


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
        if attention is None or mlp is None or not _has_projections(attention, mlp):
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
        activation = _activation(attention.config)
        dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout) and m.p]
        known = [norm for norm in (*norms, *heads) if norm is not None]
        if len(known) != len(norms) + len(heads) or activation is None or dropouts:
            return None
        return cls(
            layer,
            attention,
            (known[0], known[1]),
            (known[2], known[3]) if len(norms) == 4 else None,
            (known[-2], known[-1]) if heads else None,
            Gate(activation),
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
            attention.config._attn_implementation, _eager(attention)
        )
        if hasattr(attention, "attn_logit_softcapping"):
            options = {**options, "softcap": attention.attn_logit_softcapping}
        if (window := _window(attention)) is not None:
            options = {**options, "sliding_window": window}
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


def fused_blocks(model: PreTrainedModel) -> list[Block] | str:
    """The blocks of the decoder layers of `model`, or why they stay as they are."""
    layers, blocks, compared = model.base_model.layers, [], set()
    name = type(layers[0]).__name__
    for layer in layers:
        block = Block.of(layer)
        if block is None:
            return f"{name} stays as it is: its parts are not those of a known block"
        blocks.append(block)
    for layer, block in zip(layers, blocks, strict=True):
        kind = (_code(layer), _window(block.attention))
        if kind not in compared:
            compared.add(kind)
            # Not `>`: NaN is no agreement.
            if not (error := _difference(model, layer, block)) <= TOLERANCE[_dtype(model)]:
                return f"{name} stays as it is: ours differs by {error:.1e} on random input"
    return blocks


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


def _code(layer: nn.Module) -> tuple[object, ...]:
    """What a layer runs, weights apart: its modules' classes, and forwards that were put on one."""
    return tuple(
        (name, type(module), vars(module).get("forward")) for name, module in layer.named_modules()
    )


def _difference(model: PreTrainedModel, layer: Any, block: Block) -> float:
    """The largest difference of both outputs, relative to the largest output."""
    embeddings = model.get_input_embeddings().weight
    if not has_values(embeddings):
        return 0.0  # a plan has no numbers to compare; the run does it
    device, dtype = embeddings.device, embeddings.dtype
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(1, COMPARED_TOKENS, embeddings.shape[1], generator=drawn).to(device, dtype)
    positions = torch.arange(COMPARED_TOKENS, device=device).unsqueeze(0)
    kind = getattr(block.attention, "layer_type", None)
    rotary = model.base_model.rotary_emb
    options = {"position_ids": positions, "attention_mask": None}
    with torch.no_grad():
        try:
            embedded = rotary(x, positions)
        except TypeError:
            embedded = rotary(x, positions, kind)
        expected = layer(x, position_embeddings=embedded, **options)
        ours = block.forward(x, embedded, **options)
    return float((ours - expected).abs().max() / expected.abs().max())


def _eager(attention: nn.Module) -> Any:
    """The plain attention of a model's own module, which no registry holds."""
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)


def _has_projections(attention: Any, mlp: Any) -> bool:
    """Whether a layer has the projections that its architecture's record names."""
    known = ARCHITECTURES.get(attention.config.model_type)
    if known is None:
        return False
    of_attention = all(hasattr(attention, name) for name in (*known.query_key_value, "o_proj"))
    return of_attention and all(hasattr(mlp, name) for name in (*known.gate_up, "down_proj"))


def _activation(config: Any) -> str | None:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if name in ACTIVATIONS else None


def _window(attention: Any) -> int | None:
    """The sliding window of a layer, where it has one."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if getattr(attention, "layer_type", "full_attention") == "full_attention":
        return getattr(attention.config, "sliding_window", None)
    return None


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = model.dtype
    return dtype

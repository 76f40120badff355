"""What a decoder layer is made of, found by names and outputs and not by its class.

Gemma 3n and 4 hand a dictionary from layer to layer: the last layer of each kind before the sharing
ones stores its keys and values, (B, kv heads, T, d) each, and those read them. A layer that is
recomputed with that dictionary in its hands would read in backward whatever is in it by then, and
its checkpoint would hold the results of what it is the checkpoint of: a circle that nothing frees.
So what is recomputed takes keys and values as arguments and gives them as results (`SharedKeys`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base.architecture import architecture_of
from qlora_kit.device.target import has_values
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.rotary import rotate
from qlora_kit.kernels.swiglu import ACTIVATIONS

NORMS = (
    # Before attention, behind it, before the MLP, behind it; the first whose norms are all there.
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
     "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm",
     "post_mlp_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)  # fmt: skip
"""The names of a layer's norms in Gemma, GLM 4, Llama and OLMo 2, in this order."""


def norm_names(layer: Any) -> tuple[str | None, ...] | None:
    """The names of a layer's four norms as `NORMS` has them, or None where none of these fit."""
    for names in NORMS:
        if all(isinstance(getattr(layer, name, None), nn.Module) for name in names if name):
            return names
    return None


def norm_of(module: Any) -> FrozenNorm | None:
    """The norm that gives the numbers of `module`, or None where no style does.

    Which style a module follows is found by comparing outputs, not by its class.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if isinstance(eps, float) and getattr(module, "with_scale", True) is False:
        return _weightless(module, eps)
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
        for from_zero, rounds_once in ((False, False), (False, True), (True, False)):
            norm = FrozenNorm(weight, eps, from_zero, rounds_once)
            if torch.equal(norm.by_torch(x)[0], expected):
                return norm
    return None


def _weightless(module: nn.Module, eps: float) -> FrozenNorm | None:
    """The norm without a weight that gives the numbers of `module`, or None."""
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        norm = FrozenNorm(None, eps, from_zero=False)
        return norm if torch.equal(norm.by_torch(x)[0], module(x)) else None


def query_key_value(attention: Any) -> list[str]:
    """The names of the projections of queries, keys and values that a layer has.

    Gemma 4 has layers that read other layers' keys and values, and some whose values are the keys.
    """
    names = architecture_of(attention.config.model_type).query_key_value
    if getattr(attention, "is_kv_shared_layer", False):
        return list(names[:1])
    return [name for name in names if getattr(attention, name, name) is not None]


def head_norms(attention: Any) -> list[str] | None:
    """The names of the norms of queries, keys and values; None where one of a pair is missing."""
    names = [name for name in ("q_norm", "k_norm", "v_norm") if hasattr(attention, name)]
    needed = ["q_norm"] if getattr(attention, "is_kv_shared_layer", False) else ["q_norm", "k_norm"]
    return names if not names or names[: len(needed)] == needed else None


def per_layer_parts(layer: Any) -> list[str]:
    """The names of what adds a layer's own embedding (Gemma 4): gate, projection and norm."""
    names = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
    return list(names) if all(hasattr(layer, name) for name in names) else []


def projections(layer: Any) -> list[str] | None:
    """The names of a layer's linears as its family's record has them, None where one is missing."""
    known = architecture_of(layer.self_attn.config.model_type)
    names = [f"self_attn.{name}" for name in (*query_key_value(layer.self_attn), "o_proj")]
    names += [f"{known.mlp}.{name}" for name in (*known.gate_up, known.down)]
    modules = dict(layer.named_modules())
    return names if all(name in modules for name in names) else None


def rotation_of(attention: Any) -> str | None:
    """Which values of a head a layer turns with each other: `halves`, `neighbours` or `none`.

    None where its code does something else. Which it is is found by comparing numbers.
    """
    config = attention.config
    without = getattr(config, "position_embedding_type", "rope") is None
    if without or not getattr(attention, "use_rope", True):
        return "none"
    if architecture_of(config.model_type).rotates_in_windows_alone and not (
        attention.sliding_window is None or attention.is_sliding
    ):
        return "none"
    return _rotation_by(getattr(_code_of(attention), "apply_rotary_pos_emb", None))


@functools.cache
def _rotation_by(function: Callable[..., Any] | None) -> str | None:
    """What a family's own function does to queries and keys, or None for something else."""
    if function is None:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        drawn = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, 3, 8, generator=drawn)  # (B, heads, T, d)
        angles = torch.randn(1, 3, 4, generator=drawn).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        try:
            alone = list(inspect.signature(function).parameters)[1] == "cos"
            found = (function(x, cos, sin),) if alone else function(x, x, cos, sin)
        except (IndexError, TypeError, RuntimeError):
            return None
        for kind in ("halves", "neighbours"):
            ours = rotate(x.transpose(1, 2), cos, sin, kind == "neighbours").transpose(1, 2)
            if isinstance(found, tuple) and all(torch.equal(one, ours) for one in found):
                return kind
    return None


def query_scale(attention: Any) -> Callable[[Tensor], Tensor] | None:
    """The factor of queries (B, T, 1, 1) by their positions (B, T), None where it is always 1.

    Ministral 3 scales queries beyond the length that it was first trained on, as Llama 4 does.
    """
    scale = getattr(_code_of(attention), "get_llama_4_attn_scale", None)
    if scale is None:
        return None
    rope = attention.config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return lambda positions: scale(positions, beta, length).transpose(1, 2)


def unexplained(layer: nn.Module, explained: Sequence[str | None]) -> bool:
    """Whether a layer has a tensor that is not named and belongs to none of the modules named."""
    known = tuple(f"{name}." for name in explained if name)
    named = itertools.chain(layer.named_parameters(), layer.named_buffers())
    return any(not name.startswith(known) and name not in explained for name, _ in named)


def activation(config: Any) -> str | None:
    """The gated MLP's activation by name, None where there is no kernel for it."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if name in ACTIVATIONS else None


def window(attention: Any) -> int | None:
    """The sliding window of a layer, where it has one."""
    if not getattr(attention, "is_sliding", True):
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if getattr(attention, "layer_type", "full_attention") == "full_attention":
        return getattr(attention.config, "sliding_window", None)
    return None


def eager_attention(attention: nn.Module) -> Any:
    """The plain attention of a model's own module, which no registry holds."""
    return getattr(_code_of(attention), "eager_attention_forward", None)


def _code_of(module: nn.Module) -> Any:
    """The Python module of a family's class."""
    return sys.modules[type(module).__module__]


OPTION = "shared_kv_states"
"""What transformers calls the dictionary; its keys are the layers' types."""


@dataclass(frozen=True)
class SharedKeys:
    """What a layer does with the entry of its `kind` in the dictionary: `reads` or `stores` it."""

    kind: str = ""
    reads: bool = False
    stores: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> SharedKeys:
        """As the layer's own attention says it; most families' layers do neither."""
        attention: Any = getattr(layer, "self_attn", None)
        if not hasattr(attention, "is_kv_shared_layer"):
            return cls()
        reads, stores = attention.is_kv_shared_layer, attention.store_full_length_kv
        return cls(attention.layer_type, reads, stores)

    def through(
        self,
        again: Callable[..., Any],
        run: Callable[..., Any],
        shared: MutableMapping[str, Any] | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """What `again`, torch's checkpoint, gives for `run(*args, shared, **options)`."""
        if shared is None:
            return again(run, *args, **options)
        keys = tuple(shared[self.kind]) if self.reads else ()

        def apart(*args: Any, **options: Any) -> Any:
            given, rest = args[: len(keys)], args[len(keys) :]
            inside: dict[str, Any] = {self.kind: given} if given else {}
            hidden = run(*rest, **{OPTION: inside}, **options)
            return (hidden, *inside[self.kind]) if self.stores else hidden

        results = again(apart, *keys, *args, **options)
        if not self.stores:
            return results
        hidden, *stored = results
        shared[self.kind] = tuple(stored)
        return hidden

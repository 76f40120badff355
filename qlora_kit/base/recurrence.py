"""Layers that carry state from token to token besides attention, and what they do not allow.

A convolution or a recurrence (Mamba, the gated delta rule, short convolutions) reads the tokens
that stand before it, whatever their `position_ids`. So rows of a pack would read each other, and
padding has to stand behind the tokens. Such a layer is found in the built model: by a convolution
in it, by what transformers caches for it, or by what its class says of the whole model.

transformers computes such layers in torch, chunk by chunk and in fp32, unless `causal_conv1d`,
`fla` or `mamba_ssm` are installed beside it: then it takes their kernels by itself. A plan counts
the torch code.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.direct import masks_by_position
from qlora_kit.errors import ConfigError


def state_carriers(model: PreTrainedModel) -> list[str]:
    """What of `model` carries state from token to token, by name; empty where only attention does.

    Convolutions by their modules' names, else the kinds of layers in its config, else its class.
    """
    convolutions = [name for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    if convolutions:
        return convolutions
    kinds = dict.fromkeys(getattr(model.config, "layer_types", None) or [])
    cached = [kind for kind in kinds if _caches_state(kind)]
    if cached:
        return [f"{kind} layers" for kind in cached]
    # transformers' word for a model whose past is more than keys and values.
    return [type(model).__name__] if getattr(model, "_is_stateful", False) else []


def recurrent_parameters(model: nn.Module) -> frozenset[str]:
    """The names of what a recurrence decays and shifts by (`A_log`, `dt_bias`, `D`).

    They are held by the parent of a convolution itself. Files that have them in fp32 do so because
    a rounded logarithm of a decay is another decay: by up to 1 % in bf16.
    """
    return frozenset(
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if any(isinstance(part, _ConvNd) for part in module.children())
        for leaf, _ in module.named_parameters(recurse=False)
    )


def check_packing(model: PreTrainedModel) -> None:
    """Refuse packed rows for a model whose layers would carry state from one row into the next.

    Errors: `ConfigError`.
    """
    carriers, record = state_carriers(model), architecture_of(model.config.model_type)
    if not carriers and not (record.packs and (record.known or masks_by_position(model))):
        carriers = [f"the attention of {type(model).__name__}, which gets no positions,"]
    if carriers:
        more = f" and {len(carriers) - 1} more" if len(carriers) > 1 else ""
        raise ConfigError(
            f"packing puts rows beside each other that model_type {model.config.model_type!r} does "
            f"not keep apart: {carriers[0]}{more} would carry the end of one row into the next",
            "leave --packing out; --group_by_length also saves padding",
        )


def avoid_fused_training(model: nn.Module) -> None:
    """Let the parents of convolutions compute in training as they do in evaluation.

    Where `mamba_ssm` is installed, transformers (5.23) hands such a module's `out_proj.weight` to
    one kernel that trains through convolution, scan and projection: packed bytes where it is
    quantized, and past the adapter. The flag of the module itself chooses that and nothing else;
    those of its parts, dropout of adapters among them, stay as they are.
    """
    for module in model.modules():
        if any(isinstance(part, _ConvNd) for part in module.children()):
            module.register_forward_pre_hook(_evaluating)


def _evaluating(module: nn.Module, inputs: Any) -> None:
    module.training = False


def _caches_state(kind: str) -> bool:
    """Whether transformers keeps a state, not keys and values alone, for layers of a kind."""
    cached = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    return isinstance(cached, type) and issubclass(cached, LinearAttentionCacheLayerMixin)

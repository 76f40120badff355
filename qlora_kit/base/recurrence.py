"""What a model's own code does past its linears: carries state, reads weights, makes masks.

A convolution or a recurrence (Mamba, the gated delta rule, short convolutions) reads the tokens
that stand before it, whatever their `position_ids`. So rows of a pack would read each other, and
padding has to stand behind the tokens. Such a layer is found in the built model: by a convolution
in it, by what transformers caches for it, or by what its class says of the whole model.

transformers computes such layers in torch, chunk by chunk and in fp32, unless `causal_conv1d`,
`fla` or `mamba_ssm` are installed beside it: then it takes their kernels by itself. A plan counts
the torch code.

`self.dt_proj.weight @ x` multiplies by whatever lies in that attribute: packed bytes of a quantized
linear, and never by its adapter. So such a linear, found in the source of the module that holds it,
stays as it is and gets none. What only initializes weights does not count, nor what no step comes
to: kernels that are kept out of training here, and BLOOM's slow way of adding up parts that were
trained on several devices. Masks of attention keep the rows of a pack apart where their maker gets
positions; that is in the source too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.decoder import layers_path
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


NOT_A_STEP = ("__init__", "reset_parameters", "extra_repr", "_init_weights", "cuda_kernels_forward")
NOT_TAKEN = "slow_but_exact"
MAKES_MASK = re.compile(r"create_(\w+_)?causal_mask|create_chunked_causal_mask|mask_function")
POSITIONS = "position_ids"


def read_directly(model: nn.Module) -> frozenset[str]:
    """The names of the linears in `model` whose weight its code reads by itself."""
    return frozenset(
        name for name in weights_read(model) if hasattr(model.get_submodule(name), "in_features")
    )


def weights_read(model: nn.Module) -> frozenset[str]:
    """The names of all modules in `model` whose weight the code of another one reads."""
    return frozenset(
        f"{owner}.{leaf}".removeprefix(".")
        for owner, module in model.named_modules()
        for leaf in _weights_read(type(module))  # type: ignore[arg-type]
        if isinstance(getattr(module, leaf, None), nn.Module)
    )


@functools.cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes `x` of which the methods of a class of transformers read `self.x.weight`."""
    return frozenset(
        leaf
        for own in kind.__mro__
        if own.__module__.startswith("transformers.models.")
        for leaf in _reads(ast.parse(textwrap.dedent(inspect.getsource(own))))
    )


def masks_by_position(model: Any) -> bool:
    """Whether the masks of attention of `model` are made with positions, wherever they are made.

    transformers keeps the rows of a pack apart by a mask that is made of their positions, if its
    maker gets them.
    """
    path = layers_path(model)
    made: list[bool] = []
    for name, module in model.named_modules():
        if name == "" or path.startswith(f"{name}."):
            made += _masks_made(type(module))  # type: ignore[arg-type]
    return bool(made) and all(made)


@functools.cache
def _masks_made(kind: type[nn.Module]) -> tuple[bool, ...]:
    """For each mask that a class of transformers makes, whether its maker gets positions."""
    sources = (own for own in kind.__mro__ if own.__module__.startswith("transformers.models."))
    trees = [ast.parse(textwrap.dedent(inspect.getsource(own))) for own in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    handed = any(
        isinstance(key, ast.Constant) and key.value == POSITIONS
        for node in nodes
        if isinstance(node, ast.Dict)
        for key in node.keys
    )
    return tuple(
        handed
        if any(word.arg is None for word in node.keywords)
        else any(
            word.arg == POSITIONS and ast.unparse(word.value) != "None" for word in node.keywords
        )
        for node in nodes
        if isinstance(node, ast.Call) and MAKES_MASK.fullmatch(ast.unparse(node.func))
    )


def _reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in NOT_A_STEP:
            continue
        if isinstance(node, ast.If) and NOT_TAKEN in ast.unparse(node.test):
            yield from (leaf for other in node.orelse for leaf in _reads(other))
            continue
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            owner = node.value
            if isinstance(owner, ast.Attribute) and ast.unparse(owner.value) == "self":
                yield owner.attr
        yield from _reads(node)

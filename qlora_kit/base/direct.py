"""What a model's own code does past its layers: weights it reads, masks it makes; by its source.

`self.dt_proj.weight @ x` multiplies by whatever lies in that attribute: packed bytes of a quantized
linear, and never by its adapter. So such a linear stays as it is and gets none. It is found in the
source of the module that holds it. What only initializes weights does not count, nor what no step
comes to: kernels that `base/recurrence.py` keeps out of training, and BLOOM's slow way of adding
up parts that were trained on several devices.

Masks of attention keep the rows of a pack apart where their maker gets positions; that is in the
source too.
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

from qlora_kit.base.decoder import layers_path

NOT_A_STEP = ("__init__", "reset_parameters", "extra_repr", "_init_weights", "cuda_kernels_forward")
NOT_TAKEN = "slow_but_exact"
MAKES_MASK = re.compile(r"create_(\w+_)?causal_mask|create_chunked_causal_mask|mask_function")
POSITIONS = "position_ids"


def read_directly(model: nn.Module) -> frozenset[str]:
    """The names of the linears in `model` whose weight its code reads by itself."""
    return frozenset(
        f"{owner}.{leaf}".removeprefix(".")
        for owner, module in model.named_modules()
        for leaf in _weights_read(type(module))  # type: ignore[arg-type]
        if hasattr(getattr(module, leaf, None), "in_features")
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

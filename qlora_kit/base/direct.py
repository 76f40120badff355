"""Linears whose weight a model's own code reads, past the layer's forward.

`self.dt_proj.weight @ x` multiplies by whatever lies in that attribute: packed bytes of a quantized
linear, and never by its adapter. So such a linear stays as it is and gets none. It is found in the
source of the module that holds it. What only initializes weights does not count, nor what no step
comes to: kernels that `base/recurrence.py` keeps out of training, and BLOOM's slow way of adding
up parts that were trained on several devices.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

NOT_A_STEP = ("__init__", "reset_parameters", "extra_repr", "_init_weights", "cuda_kernels_forward")
NOT_TAKEN = "slow_but_exact"


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

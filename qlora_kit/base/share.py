"""What of a model stays in 16 bits when its linears are quantized, and what makes that too much.

Embeddings, the output head and norms stay, and so do convolutions, recurrences and linears that are
small: they take little, and 4 bits would hurt them most. A model whose large weights are none of
these and no linears either would be called quantized and mostly not be, so it is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qlora_kit.options.checks import size_text

SMALLEST, FEWEST_ROWS = 4096, 32
"""Elements below which a linear is not worth quantizing, and rows up to which it is a gate."""
NAMED = 5
"""Modules that a warning names."""
LARGE = 0.1
"""The share of all weights from which names are told, or a model is refused."""


@dataclass(frozen=True)
class Share:
    """Elements that stay in 16 bits: those of embeddings and head, and the rest by module."""

    total: int
    ends: int
    others: Mapping[str, int]

    @property
    def count(self) -> int:
        """All elements that stay."""
        return self.ends + sum(self.others.values())

    def said(self, itemsize: int, dtype: str) -> str:
        """A sentence with the bytes of elements of `itemsize`, and per cent of all weights."""
        others = self.count - self.ends
        return (
            f"{size_text(self.count * itemsize)} stay in {dtype}, {self._part(self.count)} of the "
            f"weights: embedding and head {self._part(self.ends)}, the rest {self._part(others)}"
        )

    def warning(self, itemsize: int, dtype: str) -> str | None:
        """The modules beside embedding and head with their bytes, if they are above a tenth."""
        others = self.count - self.ends
        if others <= LARGE * self.total:
            return None
        largest = Counter(self.others).most_common(NAMED)
        named = ", ".join(f"{name} {size_text(size * itemsize)}" for name, size in largest)
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        return (
            f"{self._part(others)} of the weights stay in {dtype} beside embedding and head, "
            f"{size_text(others * itemsize)}: {named}{more}"
        )

    def _part(self, count: int) -> str:
        return f"{count / self.total:.1%}"


def share_of(model: Any, quantized: Collection[str], shared: Collection[str]) -> Share:
    """What stays in 16 bits of a model where the linears named `quantized` do not.

    `shared` are the names of tensors that share another one's storage, and count there; modules of
    one name in all layers are one.
    """
    inner = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    total, ends = 0, 0
    others: Counter[str] = Counter()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if f"{name}.{leaf}" in shared:  # on the meta device it is there twice
                continue
            total += parameter.numel()
            if name in quantized and leaf == "weight":
                continue
            if id(module) in inner:
                ends += parameter.numel()
            else:
                others[_part(name, leaf)] += parameter.numel()
    return Share(total, ends, others)


def small_linears(linears: Mapping[str, Any]) -> frozenset[str]:
    """The names of linears that are small: few elements, or the few rows of a gate or a router."""
    return frozenset(
        name
        for name, layer in linears.items()
        if layer.in_features * layer.out_features < SMALLEST or layer.out_features <= FEWEST_ROWS
    )


def large_others(model: nn.Module) -> dict[str, int]:
    """Elements of weights that make more than a tenth and are no linear's, embedding's or such.

    By what they are called in all layers.
    """
    found: Counter[str] = Counter()
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.numel() >= SMALLEST:
                found[f"{_part(name, leaf)} ({type(module).__name__})"] += parameter.numel()
    whole = sum(found.values()) > LARGE * total
    return dict(found.most_common(3)) if whole else {}


def _part(name: str, leaf: str) -> str:
    """What a module is called in all layers: the last part of its name that is no number."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else leaf

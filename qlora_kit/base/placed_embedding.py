"""Embeddings whose rows are elsewhere, or in another dtype, than the weight that they come from.

A weight may lie on the host (`embedding.py`), or be held in the 16 bits of its files where a model
computes in fp32 (`narrow.py`): then rows are cast as they are looked up, which changes no number.
What a family's class does to rows, such as a factor, is done to them as before. So the dtype that a
model computes in is not that of its embedding: `computed_in` says it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlacedEmbedding(nn.Embedding):
    """An embedding whose rows are on the device and in the dtype of `place`, an empty tensor."""

    place: Tensor

    @property
    def table(self) -> Tensor:
        """The weight (V, h) that rows are looked up in."""
        found: Tensor = vars(self).get("held", self.weight)
        return found

    def seen(self) -> PlacedEmbedding:
        """This embedding for its class's own code, which asks its weight what dtype to go on in.

        Gemma's casts its factor to that.
        """
        if self.weight.dtype is self.place.dtype:
            return self
        shown = copy.copy(self)
        vars(shown).update(held=self.weight, weight=self.place)
        return shown

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Classes that `placed` makes cannot be found by their names."""
        return _empty, _made_of(self), vars(self)


class NarrowEmbedding(PlacedEmbedding):
    """An embedding whose `weight` (V, h) has fewer bits than its rows (..., h)."""

    def forward(self, input: Tensor) -> Tensor:
        """The rows of ids (...), cast."""
        return F.embedding(input, self.table).to(self.place.dtype)


def weight_on_device(model: Any) -> Tensor:
    """A tensor on a model's device and in the dtype that it computes in, with or without numbers.

    Its embedding may lie elsewhere, or be held in fewer bits.
    """
    embedding = model.get_input_embeddings()
    found: Tensor = embedding.place if isinstance(embedding, PlacedEmbedding) else embedding.weight
    return found


def computed_in(model: Any) -> torch.dtype:
    """The dtype that a model computes in, whatever its weights are held in."""
    return weight_on_device(model).dtype


def gives_rows(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module is an embedding's lookup, with something done to the rows at most."""
    kind = type(module)
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if kind is nn.Embedding or issubclass(kind, PlacedEmbedding):
        return True
    code = getattr(kind.forward, "__code__", None)
    return (
        kind.__bases__ == (nn.Embedding,) and code is not None and "__class__" in code.co_freevars
    )


@functools.cache
def placed(kind: type[nn.Embedding], ours: type[PlacedEmbedding]) -> type[PlacedEmbedding]:
    """`kind` with its rows from `ours`: its forward does to them what it did before."""
    if kind is nn.Embedding:
        return ours

    def forward(self: PlacedEmbedding, input: Tensor) -> Tensor:
        rows: Tensor = kind.forward(self.seen(), input)
        return rows

    name = ours.__name__.replace("Embedding", kind.__name__)
    return type(name, (kind, ours), {"forward": forward, "made_of": (kind, ours)})


def _made_of(embedding: PlacedEmbedding) -> Any:
    """What `placed` made the class of an embedding of."""
    return getattr(embedding, "made_of", (nn.Embedding, type(embedding)))


def _empty(kind: Any, ours: Any) -> PlacedEmbedding:
    """An embedding without anything in it, for who unpickles or copies one."""
    made = placed(kind, ours)
    return made.__new__(made)


def cast_rows(dtype: torch.dtype, embedding: nn.Embedding) -> None:
    """Let an embedding that is held in another dtype give rows in `dtype`, in place."""
    if not isinstance(embedding, PlacedEmbedding):
        vars(embedding)["place"] = embedding.weight.new_empty(0, dtype=dtype)
        embedding.__class__ = placed(type(embedding), NarrowEmbedding)  # type: ignore[arg-type]


def cast_no_rows(embedding: NarrowEmbedding) -> None:
    """Let it be what it was before `cast_rows`."""
    embedding.__class__ = _made_of(embedding)[0]
    del vars(embedding)["place"]

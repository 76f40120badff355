"""Embeddings whose weight stays in the host's memory: the rows of a batch are fetched for it.

The host gathers the rows of a batch's ids and sends them, (B, T, h): the device never has the
weight. Of Llama 3's 128,256 tokens by 4,096 that is 1.05 GB, of the embeddings that Gemma 3n and 4
have for each layer several. What the family's class does to the rows, such as a factor, is done to
them on the device as before, so no number changes.

The host has the ids before the device does: a batch keeps them (`ids_on_host`), and nobody waits.
Elsewhere, as in generation, they are copied back, which waits for the device once a forward.

An embedding that a head in 16 bits shares stays on the device, for the head needs its weight there.
So does one of a class whose forward is no embedding's with something done to its rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.meta_model import name_of_head, tied_names
from qlora_kit.base.placed_embedding import PlacedEmbedding, gives_rows, placed
from qlora_kit.base.tensors import Tag
from qlora_kit.device.target import (
    device_type,
    has_own_memory,
    has_values,
    set_inside,
    without_values,
)
from qlora_kit.device.transfer import TO_DEVICE

_IDS: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("ids", default=None)


class HostEmbedding(PlacedEmbedding):
    """An embedding whose `weight` (V, h) is on the host and no parameter; it gives (..., h).

    `place` is a parameter here, for whoever asks a model's first one for its device and its dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The rows of ids (...) as a tensor (..., h) on the device."""
        weight = self.table
        if not has_values(weight) and device_type(weight) != "cpu" == input.device.type:
            rows = weight.new_empty(*input.shape, self.embedding_dim)
            without_values(TO_DEVICE, (rows,), ())
            return rows
        to, ids = self.place, _on_host(input).reshape(-1)
        rows = weight.new_empty(
            ids.numel(), self.embedding_dim, pin_memory=to.device.type == "cuda"
        )
        torch.index_select(weight, 0, ids, out=rows)
        # Page-locked memory of torch's own is not used again before the copy has ended.
        return rows.view(*input.shape, self.embedding_dim).to(
            to.device, to.dtype, non_blocking=True
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The weight by its name, as of any embedding; not the empty parameter."""
        destination[f"{prefix}weight"] = self.weight.detach()


def ids_on_host(ids: Tensor, on_host: Tensor | None) -> AbstractContextManager[None]:
    """Inside, the host has the token ids that a device has as `ids`: nobody reads them from it."""
    return set_inside(_IDS, None if on_host is None else (ids, on_host))


def _on_host(ids: Tensor) -> Tensor:
    known = _IDS.get()
    return known[1] if known is not None and _same(known[0], ids) else ids.cpu()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same memory, as where a model takes a view of its ids."""
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and (one.shape, one.stride()) == (other.shape, other.stride())
        and one.storage_offset() == other.storage_offset()
    )


def embeddings(model: Any) -> dict[str, nn.Module]:
    """What a model looks its token ids up in, by name: one embedding, or one for all layers too."""
    found = (
        model.get_input_embeddings(),
        getattr(model.base_model, "embed_tokens_per_layer", None),
    )
    return {
        name: one for name, one in model.named_modules() if any(one is other for other in found)
    }


def movable_embeddings(model: Any, head_bits: int) -> dict[str, nn.Embedding]:
    """Those of its embeddings whose weight may stay on the host, by name."""
    own = f"{name_of_head(model)}.weight" if head_bits < 16 else None
    tied = {name: source for name, source in tied_names(model).items() if name != own}
    shared = tied.keys() | set(tied.values())
    return {
        name: one
        for name, one in embeddings(model).items()
        if gives_rows(one) and f"{name}.weight" not in shared
    }


def move_to_host(embedding: nn.Embedding, weight: Tensor, device: torch.device) -> None:
    """Let an embedding fetch its rows from `weight` (V, h) of the host for `device`, in place."""
    # Until it is filled its weight has the dtype that the model computes in, and no memory.
    empty = torch.empty(0, dtype=embedding.weight.dtype, device=device)
    embedding.__class__ = placed(type(embedding), HostEmbedding)  # type: ignore[arg-type]
    del embedding._parameters["weight"]
    vars(embedding)["weight"] = weight
    embedding.register_parameter("place", nn.Parameter(empty, requires_grad=False))


def host_component(weight: Tensor, device: torch.device) -> str:
    """What a weight on the host counts as in a run on `device`, or planned for another one."""
    apart = has_own_memory(device) or device_type(weight) != "cpu"
    return "host" if apart else "weights_other"


def tag_host(module: nn.Module, tag: Tag) -> None:
    """Hand over the weight of an embedding on the host; nothing of any other module."""
    if isinstance(module, HostEmbedding):
        tag(host_component(module.weight, module.place.device), (module.weight,))


def kept_on_device(model: Any, head_bits: int) -> str | None:
    """Why the embedding of a model cannot stay on the host, in a sentence; None where it can."""
    movable = movable_embeddings(model, head_bits)
    first = next(iter(embeddings(model)))
    if first in movable or isinstance(model.get_input_embeddings(), HostEmbedding):
        return None
    if f"{first}.weight" in {*tied_names(model), *tied_names(model).values()}:
        why = "the head shares it; with --head_bits 8 or 4 it has a weight of its own"
    else:
        why = f"{type(model.get_input_embeddings()).__name__} looks up in a way of its own"
    others = movable or any(isinstance(one, HostEmbedding) for one in embeddings(model).values())
    rest = "; that of the layers is in host memory" if others else ""
    return f"offload_embedding: the embedding stays on the device, for {why}{rest}"

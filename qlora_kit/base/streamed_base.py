"""A loaded base whose decoder layers are moved into a store, and streamed from there.

`came` is called with each quantized linear as it arrives, so that a device never holds the whole
base; `stream_layers` then makes the blocks, and hooks the stream into the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.decoder import decoder_layers, layers_path
from qlora_kit.base.layer_store import (
    HostStore,
    Place,
    Places,
    Store,
    along,
    block_bytes,
    piece_sizes,
    places_of,
)
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.stream import SLOTS, LayerStream
from qlora_kit.base.tagged import component_of, tag_linear
from qlora_kit.base.tensors import Tag, untagged
from qlora_kit.config.training import Placement
from qlora_kit.device.target import device_type, has_own_memory, without_values
from qlora_kit.device.transfer import TO_HOST, host_memory, is_planned

HOST = "host"
"""The component of memory that is no device's (`memory/counter.py`)."""


def came(
    model: Any,
    name: str,
    made: Tensor | QuantizedLinear,
    tag: Tag,
    leaving: str | None = None,
    in_files: bool = False,
) -> None:
    """Tag what has been put into a model; what has a name that begins with `leaving` goes away.

    It goes to the host, and nowhere if it is `in_files`; what is small of it stays, and so does all
    where there is no other memory.
    """
    if isinstance(made, QuantizedLinear):
        tag_linear(made, tag)
    else:
        tag("weights_other", (made,))
    packed = made.weight if isinstance(made, QuantizedLinear) else made
    stays = device_type(packed) == "cpu" and not in_files
    if leaving is None or stays or not name.startswith(leaving):
        return
    owner, _, leaf = (name, "", "") if made is not packed else name.rpartition(".")
    for place in places_of([model.get_submodule(owner)])[0]:
        if not leaf or (place.name, place.module) == (leaf, model.get_submodule(owner)):
            here = place.tensor
            # Of what stays in files a plan has one element, seen in every place.
            gone = here.new_empty(()).expand(here.shape) if in_files else _on_host(here, tag)
            place.put(place.held(gone))


def leaving(model: Any, placement: Placement) -> str | None:
    """What names of tensors begin with that go to the host as they come; None where none do."""
    return f"{layers_path(model)}." if placement.base_on_host else None


def stream_layers(
    model: Any,
    device: torch.device,
    tag: Tag = untagged,
    store_of: Callable[[Sequence[Places]], Store] | None = None,
) -> None:
    """Stream the decoder layers of a loaded, frozen `model` to `device`, two at a time.

    Without a store, which `store_of` makes for the places of their tensors, they are moved to the
    host's memory, layer by layer. `tag` is called with the slots, and with the host's memory.
    """
    places = places_of(list(decoder_layers(model)))
    size = max(map(block_bytes, places), default=0)
    slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    component = component_of(model)
    tag(component, slots)
    on_host = HOST if device_type(slots[0]) != "cpu" else component
    by_layer, fakes = [], _Fakes()
    for one in places:
        if store_of is None:
            by_layer.append(_block_of(one, slots[0]))
            tag(on_host, by_layer[-1])
        for place in one:
            place.put(fakes.like(place, slots[0]) if is_planned(slots[0]) else place.empty())
    LayerStream(
        model,
        places,
        HostStore(by_layer, waits=on_host != HOST) if store_of is None else store_of(places),
        slots,
        [*slots, *itertools.chain(*by_layer)],
    )


class _Fakes(dict[Any, Tensor]):
    """In a plan what modules hold whose layer is in no slot: nothing has numbers, or new memory."""

    def like(self, place: Place, slot: Tensor) -> Tensor:
        """A tensor of the shape of a place, for all of that shape."""
        key = place.shape, place.dtype, place.name
        if key not in self:
            self[key] = replace(place, offset=0).of(slot)
        return self[key]


def _block_of(places: Places, slot: Tensor) -> list[Tensor]:
    """A layer's block in the host's memory, with the bytes that its modules have now."""
    sizes = piece_sizes(block_bytes(places), device_type(slot) != "cpu")
    if has_own_memory(slot.device):
        pieces = [host_memory(size) for size in sizes]
    else:
        pieces = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for place in () if is_planned(slot) else places:
        flat = place.tensor.detach().contiguous().view(-1).view(torch.uint8)
        for there, part in along(pieces, flat, place.offset):
            there.copy_(part)
    return pieces


def _on_host(tensor: Tensor, tag: Tag) -> Tensor:
    if not is_planned(tensor):
        return tensor.detach().to("cpu")
    without_values(TO_HOST, (tensor,), ())
    moved = torch.empty_like(tensor.detach())
    tag(HOST, (moved,))
    return moved

"""A loaded base whose decoder layers are moved into a store, and streamed from there.

`leave_device` is called with each quantized linear as it arrives, so that a device never holds the
whole base; `stream_layers` then makes the blocks, and hooks the stream into the layers.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.layer_store import (
    HostStore,
    Places,
    Store,
    along,
    block_bytes,
    piece_sizes,
    places_of,
)
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.stream import SLOTS, LayerStream
from qlora_kit.base.tagged import component_of, quantized_tensors
from qlora_kit.base.tensors import Tag, untagged
from qlora_kit.device.target import device_type, has_values, without_values
from qlora_kit.device.transfer import TO_HOST, host_memory

HOST = "host"
"""The component of memory that is no device's (`memory/counter.py`)."""


def leave_device(layer: nn.Module | Tensor, tag: Tag = untagged) -> None:
    """Move the tensors of a quantized linear to the host, where the device is another memory."""
    if not isinstance(layer, QuantizedLinear) or device_type(layer.weight) == "cpu":
        return
    moved = {id(one): _on_host(one, tag) for one in quantized_tensors(layer)}
    layer.weight = nn.Parameter(moved[id(layer.weight)], requires_grad=False)
    for name, buffer in layer._buffers.items():
        # A number that stays is no part of a block, and read where the layer is.
        if id(buffer) in moved and buffer is not None and buffer.dim():
            layer._buffers[name] = moved[id(buffer)]


def stream_layers(
    model: Any, device: torch.device, tag: Tag = untagged, store: Store | None = None
) -> None:
    """Stream the decoder layers of a loaded, frozen `model` to `device`, two at a time.

    Without a `store` they are moved to the host's memory, layer by layer. `tag` is called with the
    slots, and with the host's memory. Errors: those of the store.
    """
    places = places_of(list(decoder_layers(model)))
    size = max(map(block_bytes, places), default=0)
    slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    component = component_of(model)
    tag(component, slots)
    on_host = HOST if device_type(slots[0]) != "cpu" else component
    by_layer = []
    for one in places:
        if store is None:
            by_layer.append(_block_of(one, slots[0]))
            tag(on_host, by_layer[-1])
        for place in one:
            place.put(place.empty() if has_values(slots[0]) else place.of(slots[0]))
    LayerStream(
        model,
        places,
        HostStore(by_layer, device) if store is None else store,
        slots,
        [*slots, *itertools.chain(*by_layer)],
    )


def _block_of(places: Places, slot: Tensor) -> list[Tensor]:
    """A layer's block in the host's memory, with the bytes that its modules have now."""
    locked = device_type(slot) != "cpu"
    sizes = piece_sizes(block_bytes(places), locked)
    if locked and has_values(slot):
        pieces = [host_memory(size) for size in sizes]
    else:
        pieces = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for place in places if has_values(slot) else ():
        flat = place.tensor.detach().contiguous().view(-1).view(torch.uint8)
        for there, part in along(pieces, flat, place.offset):
            there.copy_(part)
    return pieces


def _on_host(tensor: Tensor, tag: Tag) -> Tensor:
    if has_values(tensor):
        return tensor.detach().to("cpu")
    without_values(TO_HOST, (tensor,), ())
    moved = torch.empty_like(tensor.detach())
    tag(HOST, (moved,))
    return moved

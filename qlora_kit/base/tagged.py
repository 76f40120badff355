"""Which tensors of a loaded base are its quantized linears, and which the rest."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from qlora_kit.base.embedding import tag_host
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.resident import streamed_of
from qlora_kit.base.tensors import Tag


def quantized_tensors(layer: nn.Module) -> list[Tensor]:
    """A quantized layer's weight and scales; none for any other module."""
    if not isinstance(layer, QuantizedLinear):
        return []
    return [layer.weight, *(b for n, b in layer.named_buffers() if n != "nested_map")]


def shared_tables(layer: nn.Module) -> list[Tensor]:
    """The table of double quant, which layers may share."""
    table = getattr(layer, "nested_map", None)
    return [] if table is None else [table]


def tag_linear(layer: nn.Module, tag: Tag) -> None:
    """Hand over the tensors of a quantized linear, its bias left out."""
    tag("weights_quantized", quantized_tensors(layer))
    tag("weights_other", shared_tables(layer))


def component_of(model: nn.Module) -> str:
    """What the memory counts as that decoder layers are streamed through."""
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    return "weights_quantized" if quantized else "weights_other"


def tag_weights(model: nn.Module, tag: Tag) -> None:
    """Hand over the tensors of a loaded base as `read_weights` does; adapters are left out.

    Of layers that are streamed it is the memory that they lie in: on a device the slots.
    """
    blocks: dict[int, Tensor] = {}
    for module in model.modules():
        if (streamed := streamed_of(module)) is not None:
            blocks |= {one.untyped_storage()._cdata: one for one in streamed.blocks}

    def stays(tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata not in blocks

    tag(component_of(model), blocks.values())
    quantized = set()
    for module in model.modules():
        own = quantized_tensors(module)
        tag("weights_quantized", filter(stays, own))
        tag("weights_other", shared_tables(module))
        quantized |= {id(tensor) for tensor in own}
        tag_host(module, tag)
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    others = [one for name, one in named if ".lora_" not in name and id(one) not in quantized]
    tag("weights_other", filter(stays, others))

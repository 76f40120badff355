"""A built model filled with what was kept of it: tensors are read into the memory they stay in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.cache import Wanted, discard, remove, used
from qlora_kit.base.cache_entry import DamagedError, EntryReader
from qlora_kit.base.fill import finished, move_buffers, put
from qlora_kit.base.layer_store import EntryStore, is_short_of, streamed_names
from qlora_kit.base.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlora_kit.base.made import names_on_host
from qlora_kit.base.meta_model import tied_names
from qlora_kit.base.quantize import dynamic_map
from qlora_kit.base.streamed_base import leaving, stream_layers
from qlora_kit.base.tensors import CPU, Tag
from qlora_kit.config.training import ON_DEVICE, Placement

INT8, META = "int8", torch.device("meta")


def from_the_cache(base: Base, place: Wanted, tag: Tag, placement: Placement = ON_DEVICE) -> Any:
    """The model of a base as it was kept; None where it was not, or was damaged, and goes.

    Errors: `OSError` where it cannot be read now; it may be whole, and stays.
    """
    try:
        if (kept := place.found()) is None:
            return None
        with EntryReader(place.path, kept) as reader:
            model = refill(base, reader, tag, placement)
    except FileNotFoundError:  # it was cleared, or has lost a file
        remove(place)
        return None
    except (DamagedError, ValueError) as why:
        discard(place, why)
        return None
    used(place)
    return model


def refill(base: Base, kept: EntryReader, tag: Tag, placement: Placement = ON_DEVICE) -> Any:
    """`base.model` as `fill` makes it, of the tensors of an entry, all checked before one is used.

    Errors: `DamagedError` and `OSError`: then the model is as it was, and may be filled.
    """
    model, linears = base.model, kept.kept.linears
    _check_names(model, kept)
    hosted, prefix = names_on_host(base, placement), leaving(model, placement)
    away = streamed_names(kept.kept, prefix)
    with ExitStack() as opened:
        lent = None
        if is_short_of(kept.kept, away):
            # These files stay open, and what is streamed is checked where it is read from.
            lent = opened.enter_context(EntryReader(kept.path, kept.kept))
            lent.check(away)
        at_rest = CPU if lent is None else META
        places = {name: at_rest if name in away else base.device for name in kept.kept.tensors}
        found = {n: kept.empty(n, CPU if n in hosted else at) for n, at in places.items()}
        kept.read_all({name: one for name, one in found.items() if not one.is_meta})
        opened.pop_all()
    move_buffers(base, tag)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    for owner, _, leaf in [name.rpartition(".") for name in found]:
        if owner in linears and leaf != "bias":
            parts[owner][leaf] = found.pop(f"{owner}.{leaf}")
    for name, quant_type in linears.items():
        made = linear_of(model.get_submodule(name), quant_type, parts.pop(name), base.device)
        put(model, name, made, tag)
    for name, tensor in found.items():
        put(model, name, tensor, tag, base.device if name in hosted else None)
    store = None if lent is None else partial(EntryStore, model, lent)
    stream = partial(stream_layers, device=base.device, tag=tag, store_of=store)
    return finished(base, stream=None if prefix is None else stream)


def linear_of(
    linear: nn.Module, quant_type: str, parts: Mapping[str, Tensor], device: torch.device
) -> QuantizedLinear:
    """A quantized linear of its tensors by name, that computes on `device`.

    `linear` has its shape, and maybe no memory.
    """
    assert isinstance(linear, nn.Linear)
    shape = linear.in_features, linear.out_features
    if quant_type == INT8:
        return Linear8bit(*shape, parts["weight"], None, row_absmax=parts["row_absmax"])
    nested: dict[str, Any] = {}
    if "nested_absmax" in parts:
        nested = {name: parts[name] for name in ("nested_absmax", "nested_offset")}
        nested["nested_map"] = dynamic_map(device)
    form = {"quant_type": quant_type, "absmax": parts["absmax"], **nested}
    return Linear4bit(*shape, parts["weight"], None, **form)


def _check_names(model: Any, kept: EntryReader) -> None:
    """Refuse an entry of other tensors than those of a model. Errors: `DamagedError`."""
    linears, tied = kept.kept.linears, tied_names(model)
    expected = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name not in tied and name.removesuffix(".weight") not in linears
    }
    given = {
        name: torch.Size(one.shape)
        for name, one in kept.kept.tensors.items()
        if name.rpartition(".")[0] not in linears or name.endswith(".bias")
    }
    if expected != given or not linears.keys() <= dict(model.named_modules()).keys():
        raise DamagedError(f"{kept.path}: has other tensors than the model")

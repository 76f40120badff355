"""A base that the host cannot hold: quantized into the cache, part by part, and read from there.

Only for a base that is streamed, whose layers then come from the files (`layer_store.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.base.cache import Note, Wanted, discard, write
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.layer_store import is_too_much
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.made import tensors_of
from qlora_kit.base.meta_model import decoder_linears, tied_names
from qlora_kit.base.refill import from_the_cache
from qlora_kit.base.tensors import Read, Reader, Tag, checks_later
from qlora_kit.config.training import Placement
from qlora_kit.errors import ModelError

SCALES = 1.13
"""What packed values and their scales take, in packed values: fp32 for each 64 of 4 bits."""


def read_unheld(base: Base, place: Wanted, tag: Tag, placement: Placement, note: Note) -> Any:
    """The model of a base whose layers are streamed from the entry that is made of it here.

    None where the host can hold the base, or nothing can be kept: `note` is told why.
    Errors: `ModelError`, `NumericError`, `OSError` where the entry cannot be read now.
    """
    if not placement.base_on_host or not is_too_much(most_bytes(base)):
        return None
    with Reader() as read:
        write(base, place, _parts(base, read), most_bytes(base), note)
        model = from_the_cache(base, place, tag, placement)
        try:
            if model is not None:
                check_tied(base, read)
        except ModelError as error:
            discard(place, error)
            raise
    return model


def most_bytes(base: Base) -> int:
    """What the tensors of a base take once it is quantized, at most."""
    packed = decoder_linears(base.model).keys() - base.form.skipped
    inside: int = sum(
        parameter.numel()
        for name, parameter in base.model.named_parameters()
        if name.removesuffix(".weight") in packed
    )
    around: int = sum(
        parameter.numel() * base.held_itemsize(name)
        for name, parameter in base.model.named_parameters()
        if name.removesuffix(".weight") not in packed and name not in base.tied
    )
    held, head = base.quantization, base.model.get_output_embeddings()
    own = head.weight.numel() * held.head_bits / 8 if held.head_bits < 16 else 0
    return around + int((inside * held.bits / 8 + own) * SCALES)


def _parts(base: Base, read: Reader) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """What an entry of a base has, as it is made."""
    checks = checks_later(torch.empty(0, dtype=base.dtype, device=base.device))
    came = set()
    for name, made in tensors_of(base, read, checks=checks):
        came.add(name)
        yield name, made
    if checks is not None:
        checks.read()
    # What a checkpoint may hold, and the architecture has computed.
    tied = tied_names(base.model)
    for name, tensor in base.model.state_dict().items():
        if not tensor.is_meta and name not in came and name not in tied:
            yield name, tensor


def check_tied(base: Base, read: Read) -> None:
    """Refuse a second copy that is another tensor. Errors: `ModelError`."""
    entries, scaled = base.entries, base.form.scaled
    for name, shared in base.tied.items():
        if name not in entries:
            continue
        own = {name: entries[name]}
        for _, tensor in read_numbers(own, scaled, base.dtype, base.device, read):
            kept = attrgetter(shared)(base.model)[: len(tensor)]
            tensor = tensor.to(kept.device)
            if tensor.dtype is not kept.dtype:
                tensor, kept = tensor.to(base.dtype), kept.to(base.dtype)
            if not torch.equal(tensor, kept):
                raise ModelError(
                    f"{entries[name].path}: {name} differs from {shared}, to which config.json "
                    "ties it",
                    "set tie_word_embeddings to false in config.json, or fetch the model again",
                )

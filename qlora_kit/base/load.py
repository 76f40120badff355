"""Files to a frozen model on the device; the files were checked before (`open.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.cache import (
    Note,
    Wanted,
    discard,
    keep,
    silent,
    used,
    wanted,
)
from qlora_kit.base.cache_entry import DamagedError, EntryReader
from qlora_kit.base.fill import fill
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.meta_model import tied_names
from qlora_kit.base.open import open_base
from qlora_kit.base.refill import refill
from qlora_kit.base.tensors import Read, Reader, Tag, untagged
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.training import ON_DEVICE, Placement
from qlora_kit.errors import ModelError


def load_base(
    model: str = "tiny",
    *,
    bits: int | None = None,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    resize_embeddings: bool = False,
    skip_modules: str | Sequence[str] | None = None,
    base_cache: bool = True,
) -> Base:
    """A frozen base with its model and tokenizer; the options are those of `BaseConfig`.

    Without `bits` it is held in 4, or in what its files are already quantized in.
    The model is in evaluation mode, its decoder's linears quantized.
    Errors: `ConfigError`, `ModelError`, `TokenizerError`, `UnsafeInputError`, `NumericError`,
    `ResourceError`.
    """
    names = skip_modules if isinstance(skip_modules, str | None) else tuple(skip_modules)
    options = (model, revision, bits, quant_type, double_quant, dtype, device, resize_embeddings)
    base = open_base(BaseConfig(*options, skip_modules=names, base_cache=base_cache))
    read_weights(base)
    return base


def read_weights(
    base: Base, tag: Tag = untagged, placement: Placement = ON_DEVICE, note: Note = silent
) -> PreTrainedModel:
    """The frozen model of an opened base on its device; `base.model` itself, filled, once.

    It comes from the base cache where it is in there (`cache.py`), and else is kept there; `note`
    is told. `tag` is called with every tensor that stays: `weights_quantized` or `weights_other`.
    """
    place = wanted(base)
    model = None if place is None else _from_the_cache(base, place, tag, placement)
    if model is None:
        with Reader() as read:
            model = fill(base, read, tag, placement=placement)
            _check_tied(base, tied_names(model), read)
        if place is not None:
            keep(base, place, model, note)
    model.name_or_path = base.source.reference
    return model


def _from_the_cache(base: Base, place: Wanted, tag: Tag, placement: Placement) -> Any:
    """The model as it was kept; None where it was not, or was damaged."""
    try:
        if (kept := place.found()) is None:
            return None
        with EntryReader(place.path, kept) as reader:
            model = refill(base, reader, tag, placement)
    except FileNotFoundError:  # it was cleared meanwhile
        return None
    except (DamagedError, OSError, ValueError) as why:
        discard(place, why)
        return None
    used(place)
    return model


def _check_tied(base: Base, tied: Mapping[str, str], read: Read) -> None:
    """A checkpoint may hold a tied tensor a second time, if it is the same."""
    entries, scaled = base.entries, base.form.scaled
    for name, shared in tied.items():
        if name not in entries:
            continue
        own = {name: entries[name]}
        for _, tensor in read_numbers(own, scaled, base.dtype, base.device, read):
            kept = base.model.get_parameter(shared)[: len(tensor)]
            if not torch.equal(tensor.to(kept.device, base.dtype), kept):
                raise ModelError(
                    f"{entries[name].path}: {name} differs from {shared}, to which config.json "
                    "ties it",
                    "set tie_word_embeddings to false in config.json, or fetch the model again",
                )

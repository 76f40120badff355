"""Files to a frozen model on the device; the files were checked before (`open.py`).

`model.save_pretrained` refuses where what it would write is no model: transformers saves tensors by
their names alone. Of a linear of ours these are packed bytes under the name of a weight, and of an
adapted one names that its class does not have; `from_pretrained` then makes every such linear anew,
at random, and says so in a load report only.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.cache import (
    Note,
    keep,
    silent,
    wanted,
)
from qlora_kit.base.embedding import kept_on_device
from qlora_kit.base.fill import fill
from qlora_kit.base.open import open_base
from qlora_kit.base.refill import from_the_cache
from qlora_kit.base.tensors import Reader, Tag, untagged
from qlora_kit.base.unheld import check_tied, read_unheld
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.training import ON_DEVICE, Placement
from qlora_kit.errors import ExportError


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
    head_bits: int = 16,
) -> Base:
    """A frozen base with its model and tokenizer; the options are those of `BaseConfig`.

    Without `bits` it is held in 4, or in what its files are already quantized in.
    The model is in evaluation mode, its decoder's linears quantized.
    Errors: `ConfigError`, `ModelError`, `TokenizerError`, `UnsafeInputError`, `NumericError`,
    `ResourceError`.
    """
    names = skip_modules if isinstance(skip_modules, str | None) else tuple(skip_modules)
    options = (model, revision, bits, quant_type, double_quant, head_bits, dtype, device)
    base = open_base(BaseConfig(*options, resize_embeddings, names, base_cache=base_cache))
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
    model = None
    if place is not None:
        try:
            model = from_the_cache(base, place, tag, placement)
            if model is None:
                model = read_unheld(base, place, tag, placement, note)
        except OSError as why:
            place = None  # the entry may be whole: nothing takes its place
            said = f"the quantized base in the cache is left alone, and made for this run: {why}"
            warnings.warn(said, stacklevel=2)
    if model is None:
        with Reader() as read:
            model = fill(base, read, tag, placement=placement)
            check_tied(base, read)
        if place is not None:
            keep(base, place, model, note)
    head_bits = base.quantization.head_bits
    if placement.embedding_on_host and (kept := kept_on_device(model, head_bits)):
        note(kept)
    model.name_or_path = base.source.reference
    if base.quantization.bits < 16:
        model.is_quantized = True  # so that transformers' Trainer refuses it before it trains
        refuse_saving(model)
    return model


def refuse_saving(model: nn.Module) -> None:
    """Let the method `save_pretrained` of a model refuse. Errors of it: `ExportError`."""
    model.save_pretrained = functools.partial(_refuse, type(model).__name__)  # type: ignore[assignment]


def allow_saving(model: nn.Module) -> None:
    """Let it be transformers' own again."""
    model.__dict__.pop("save_pretrained", None)


def _refuse(name: str, *args: Any, **options: Any) -> None:
    raise ExportError(
        f"save_pretrained of a {name} whose linears are packed or carry adapters would write what "
        "transformers loads as random linears",
        "save_adapter(base, DIR) writes the adapter, export_model(base, DIR) a whole model, and "
        "to_peft(base) makes the model that a Trainer trains and saves",
    )

"""A base: its files, checked, its model and tokenizer, and what an adapter must know of it.

All that the package knows of a base is in `Base`; nothing of it hangs on transformers' model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.base.checks import BaseFiles, is_computed
from qlora_kit.base.form import Form
from qlora_kit.base.meta_model import decoder_linears, name_of_head, tied_names
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.base.skipped import Share, share_of
from qlora_kit.base.source import Source
from qlora_kit.base.text_decoder import Wrapper
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.device.target import dtype_name

CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "context_length")
NO_CONTEXT = 2048
"""Tokens that a model is taken to be made for whose config.json says none."""


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter must know about the base it was trained on."""

    name: str
    revision: str | None
    fingerprint: str
    parameters: int
    bits: int
    quant_type: str | None
    double_quant: bool | None
    blocksize: int | None
    source_dtype: str
    compute_dtype: str
    embedding_rows: int | None = None
    """What the embedding was resized to; None where it is as in the files."""
    skip_modules: str | list[str] | None = None
    """Which linears are not quantized, as the option has it; None where all are."""
    head_bits: int = 16
    """Those of the output head."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; of `skip_modules` and `head_bits` nothing where they are left alone."""
        usual = {"skip_modules": None, "head_bits": 16}
        said = asdict(self)
        return {name: value for name, value in said.items() if usual.get(name, ...) != value}


@dataclass(frozen=True)
class Base:
    """A base whose files were checked; `read_weights` fills its model, once.

    Until then `model` has its architecture on the meta device, so that whatever depends on shapes
    alone (targets, rank, context, tokens) can be refused before a byte of weights is read. It is
    the transformers class of its architecture, of `parameters` elements as the files have them,
    shared ones counted once. `files` is what the files say, None in a plan that has no others than
    config.json. `entries` are all tensors of the files by the model's names, `form` says which of
    them are no plain numbers.
    `embedding_rows` is what the embedding (and the head) is resized to, None where the files have
    all of its rows. `tokenizer` is None in a plan of a bare config.json. `notes` are what a user
    should know of the files and the device, a sentence each. `wrapper` is what is around the text
    decoder of a multimodal checkpoint, None for a text model. `chats` are the data options of the
    run that trained the adapter which is exported, None where no run of ours did. `base_cache` says
    whether its quantized weights may come from the cache, and be kept there. `narrow` are the
    names of matrices that are held in the 16 bits of the files though fp32 is computed in.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: Source
    files: BaseFiles | None
    entries: Mapping[str, TensorEntry]
    form: Form
    quantization: Quantization
    device: torch.device
    dtype: torch.dtype
    embedding_rows: int | None = None
    notes: tuple[str, ...] = ()
    wrapper: Wrapper | None = None
    chats: DataConfig | None = None
    base_cache: bool = False
    narrow: frozenset[str] = frozenset()
    parameters: int = field(init=False)
    share: Share | None = field(init=False)
    """What stays in 16 bits beside quantized linears; None where nothing is quantized."""
    tied: Mapping[str, str] = field(init=False)
    """Names of tensors that share another one's storage in the files' model, to that other name."""
    is_tied: bool = field(init=False)
    """Whether the files have one tensor for the embedding and the head."""

    def __post_init__(self) -> None:
        # Now, for a quantized layer has fewer elements than the weight that it packs. On the meta
        # device a tensor that two modules share is there twice.
        shared = tied_names(self.model)
        named = self.model.named_parameters()
        count = sum(parameter.numel() for name, parameter in named if name not in shared)
        object.__setattr__(self, "parameters", count)
        quantized = set(decoder_linears(self.model)) - self.form.skipped
        object.__setattr__(self, "tied", shared)
        head = name_of_head(self.model)
        object.__setattr__(self, "is_tied", f"{head}.weight" in shared)
        if self.quantization.head_bits < 16 and not self.is_tied:
            quantized.add(head)
        share = None
        if self.quantization.bits < 16:
            narrow = self.narrow.difference(f"{name}.weight" for name in quantized)
            object.__setattr__(self, "narrow", narrow)
            share = share_of(self.model, quantized, shared, self.held_itemsize)
        object.__setattr__(self, "share", share)

    @property
    def may_be_kept(self) -> bool:
        """Whether its quantized weights may come from the cache: they are made here."""
        return self.base_cache and self.quantization.bits < 16 and not self.form.stored

    def held_itemsize(self, name: str) -> int:
        """Bytes of a number of a tensor that is not quantized."""
        dtype = self.entries[name].torch_dtype if name in self.narrow else self.dtype
        return dtype.itemsize

    @property
    def held_in(self) -> str:
        """The short names of the dtypes that the matrices which are not quantized are held in."""
        narrow = {dtype_name(self.entries[name].torch_dtype) for name in self.narrow}
        return " and ".join(sorted(narrow)) or dtype_name(self.dtype)

    @cached_property
    def info(self) -> BaseInfo:
        """What an adapter must know, from headers and the samples of a fingerprint."""
        assert self.files is not None  # nothing is trained on a plan's base
        skip = self.quantization.skip_modules
        dtypes = {entry.torch_dtype for entry in self.plain.values()}
        return BaseInfo(
            name=self.source.name,
            revision=self.source.revision,
            fingerprint=self.files.fingerprint,
            parameters=self.parameters,
            bits=self.quantization.bits,
            quant_type=self.quantization.quant_type,
            double_quant=self.quantization.double_quant,
            blocksize=self.quantization.blocksize,
            source_dtype="+".join(sorted(dtype_name(found) for found in dtypes)),
            compute_dtype=dtype_name(self.dtype),
            embedding_rows=self.embedding_rows,
            skip_modules=list(skip) if isinstance(skip, tuple) else skip,
            head_bits=self.quantization.head_bits,
        )

    def options(self, asked: BaseConfig) -> BaseConfig:
        """The options that this base was opened by, with what `auto` and None stood for."""
        return replace(
            asked,
            model=asked.model if self.source.is_portable else self.source.reference,
            bits=self.quantization.bits,
            quant_type=self.quantization.quant_type,
            double_quant=self.quantization.double_quant,
            dtype=dtype_name(self.dtype),
            device=str(self.device),
            resize_embeddings=self.embedding_rows is not None,
        )

    @property
    def left(self) -> str | None:
        """What stays in 16 bits, in a sentence; None where nothing is quantized."""
        return None if self.share is None else self.share.said(self.held_in)

    @property
    def warning(self) -> str | None:
        """What else than embedding and head is a large part in 16 bits; None where nothing is."""
        return None if self.share is None else self.share.warning(self.held_in)

    @property
    def in_16_bits(self) -> dict[str, float] | None:
        """What stays in 16 bits: `bytes`, and the `share` of all weights."""
        if self.share is None:
            return None
        return {"bytes": self.share.nbytes, "share": self.share.count / self.share.total}

    @property
    def plain(self) -> dict[str, TensorEntry]:
        """The tensors of numbers, those of 8-bit floats among them.

        Left out are those that are quantized already, scales, and what the model computes itself.
        """
        stored = self.form.stored.values()
        taken = {entry for one in stored for entry in one.entries.values()}
        return {
            name: entry
            for name, entry in self.entries.items()
            if entry not in taken and name not in self.form.unread and not is_computed(name)
        }

    @property
    def context(self) -> int:
        """The longest sequence that the model was made for, in tokens.

        Some families (ALiBi, recurrences) have no end; then it is `NO_CONTEXT`.
        """
        said = (getattr(self.model.config, name, None) for name in CONTEXTS)
        return next((int(value) for value in said if value), NO_CONTEXT)

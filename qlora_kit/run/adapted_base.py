"""A base with the adapters that a command names on it, checked against each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.opening import open_adapter
from qlora_kit.run.exported_base import quantized_again
from qlora_kit.run.merged_copy import asked_bits, merge_in_memory
from qlora_kit.run.named_base import Named, base_of
from qlora_kit.run.prompt_format import PromptFormat, formats_of
from qlora_kit.run.saved_adapter import SavedAdapter


@dataclass(frozen=True)
class AdaptedBase:
    """An opened base and the files of its adapters by name; `load` reads the weights.

    `formats` says how the prompts of each adapter are written, and under None those of the base.
    """

    base: Base
    adapters: Mapping[str, SavedAdapter]
    allow_other_base: bool
    formats: Mapping[str | None, PromptFormat]
    merge_in_memory: int | None = None
    """The bits of the copies that the one adapter is merged into."""

    @staticmethod
    def open(named: Named, *, as_trained: bool = False) -> AdaptedBase:
        """The base of a command, with the options that `base_of` finds for it.

        The chat templates that were saved with a single adapter are the tokenizer's from here on,
        and the tokens at which it stops the model's. No weight is read.

        Errors: those of the base's files, and `AdapterError`.
        """
        adapter, parsed, free = named.adapter, named.parsed, named.allow_other_base
        asked = parsed[BaseConfig]
        if adapter is not None:
            asked = base_of(parsed, adapter, as_trained=as_trained)
        base = open_base(asked, named.files)
        if adapter is None:
            note = quantized_again(parsed, base)
        else:
            note = named.note_of_form(base.info.as_dict())
        if note:
            warnings.warn(note, stacklevel=2)
        for one in named.adapters.values():
            open_adapter(base.model, one.files, None if free else base.info)
        formats = formats_of(base, named.adapters)
        bits = asked_bits(parsed, base)
        return AdaptedBase(base, named.adapters, free, formats, bits)

    @cached_property
    def bank(self) -> AdapterBank:
        """The adapters by name, once `load` has read them."""
        return AdapterBank(self.base)

    def load(self) -> PreTrainedModel:
        """Read the weights, and the adapters into the bank; a single one takes part.

        Errors: as `read_weights`, `AdapterBank.add` and `AdapterBank.merge`.
        """
        model = read_weights(self.base)
        for name, adapter in self.adapters.items():
            self.bank.add(name, adapter.files, allow_other_base=self.allow_other_base)
        if len(self.adapters) == 1:
            ((name, adapter),) = self.adapters.items()
            if self.merge_in_memory is not None:
                merge_in_memory(self.bank, name, adapter, self.merge_in_memory)
            self.bank.use(name)
        return model

    def load_masters(self, *, weights: bool = True) -> None:
        """Read the weights and the adapter as training has it; without `weights` that alone.

        Errors: as `read_weights` and `load_adapter`.
        """
        if weights:
            read_weights(self.base)
        for adapter in self.adapters.values():
            load_adapter(self.base, adapter.files, allow_other_base=self.allow_other_base)

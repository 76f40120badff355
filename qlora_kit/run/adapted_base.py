"""A base with the adapter that a command names on it, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.checks import read_generation_config
from qlora_kit.base.load import read_weights
from qlora_kit.base.meta_model import take_generation_config
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.data.chat_template import take_template
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.opening import open_adapter
from qlora_kit.run.named_base import Named, base_of
from qlora_kit.run.saved_adapter import SavedAdapter


@dataclass(frozen=True)
class AdaptedBase:
    """An opened base and the files of its adapter, if there is one; `load` reads the weights."""

    base: Base
    adapter: SavedAdapter | None
    allow_other_base: bool

    @staticmethod
    def open(named: Named, allow_other_base: bool, *, as_trained: bool = False) -> AdaptedBase:
        """The base of a command, with the options that `base_of` finds for it.

        Chat templates that were saved with the adapter are the tokenizer's from here on, and the
        tokens at which it stops the model's. No weight is read.

        Errors: those of the base's files, and `AdapterError`.
        """
        adapter, parsed = named.adapter, named.parsed
        if adapter is None:
            return AdaptedBase(open_base(parsed[BaseConfig], named.files), None, allow_other_base)
        base = open_base(base_of(parsed, adapter, as_trained=as_trained), named.files)
        open_adapter(base.model, adapter.files, None if allow_other_base else base.info)
        directory = adapter.files.directory
        take_template(base.tokenizer, directory)
        take_generation_config(base.model, read_generation_config(directory), directory)
        return AdaptedBase(base, adapter, allow_other_base)

    def load(self, *, weights: bool = True) -> PreTrainedModel:
        """Read the weights, the adapter's too; without `weights` the adapter's alone.

        Errors: as `read_weights` and `load_adapter`.
        """
        model = read_weights(self.base) if weights else self.base.model
        if self.adapter is not None:
            load_adapter(self.base, self.adapter.files, allow_other_base=self.allow_other_base)
        return model

"""How the prompts of one adapter are written, and where its answers end.

An adapter brings the chat template that it was trained with, and the tokens at which it stops. On a
base with several of them a prompt is written for the adapter that answers it, so that each answers
as it does alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.checks import read_generation_config
from qlora_kit.base.meta_model import generation_config_of
from qlora_kit.config.data import DataConfig
from qlora_kit.data.answers import chat_ids, unwritten
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions, take_template
from qlora_kit.data.encode import prompt_ids
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.errors import DataError
from qlora_kit.generation.decode import end_ids
from qlora_kit.run.saved_adapter import WRITES_CHATS, SavedAdapter


@dataclass(frozen=True)
class PromptFormat:
    """The format of an adapter, or of the base alone; its `tokenizer` has its chat template.

    What the adapter's run says of its chats is read where a prompt needs it.
    """

    tokenizer: Any
    model: PreTrainedModel
    generation_config: Any
    adapter: SavedAdapter | None = None
    lender: SavedAdapter | None = None
    """The adapter whose chat template a base without one writes in, as its run did."""

    def prompt_ids(
        self, prompt: str, in_template: bool = False, *, limit: int | None = None
    ) -> list[int]:
        """The ids to go on from; `in_template`: the prompt is a user's message.

        Of more than `limit` perhaps not all are given.
        """
        options = self.chat if in_template else NO_OPTIONS
        # As the run read control tokens in its rows: as characters, or as what they are.
        literal = self.adapter is not None and self.adapter.reads_literally()
        return prompt_ids(prompt, self.tokenizer, in_template, literal, options, limit)

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids that come before the answer to some messages.

        Errors: as `chat_ids`; `DataError` where the template leaves out a part of them.
        """
        if parts := unwritten(messages, self.tokenizer, self.chat):
            raise DataError(
                f"the chat template leaves out {parts}", "forget the turns, or use another template"
            )
        return chat_ids(messages, self.tokenizer, self.chat)

    @cached_property
    def chat(self) -> ChatOptions:
        """How the adapter's run wrote chats: its variables and its day."""
        return NO_OPTIONS if self._run is None else self._run.chat()

    def rules(self, data: DataConfig, given: Collection[str]) -> EncodeRules:
        """Those of some rows' options, and how the run wrote chats where no given one says it.

        It belongs to the run's template: where another one is given, it is left.
        """
        run = None if "chat_template" in given else self._run
        if run is None or (chats := run.chats_alone()) is None:
            return EncodeRules.of(data)
        own = {name: getattr(chats, name) for name in WRITES_CHATS.difference(given)}
        return EncodeRules.of(replace(data, **own))

    @property
    def _run(self) -> SavedAdapter | None:
        """The adapter whose run says how chats are written."""
        return self.adapter or self.lender

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return end_ids(self.model, self.tokenizer, self.generation_config)


def format_beside(base: PromptFormat, adapter: SavedAdapter) -> PromptFormat:
    """That of one more adapter on a base; nothing of the base's changes.

    What a base has borrowed from another adapter is not handed on. Errors: those of files.
    """
    directory = adapter.files.directory
    tokenizer = copy.copy(base.tokenizer)
    if base.lender is not None:
        tokenizer.chat_template = None
    take_template(tokenizer, directory)
    said = read_generation_config(directory)
    config = generation_config_of(base.generation_config, said, directory)
    return PromptFormat(tokenizer, base.model, config, adapter)


def formats_of(base: Base, adapters: Mapping[str, SavedAdapter]) -> dict[str | None, PromptFormat]:
    """The format of each adapter by its name, and under None that of the base alone.

    A base without a chat template writes its chats in that of the first adapter, so that both can
    be compared; all else stays its own. One adapter alone gives the base's tokenizer and model
    what it brings.
    Errors: those of the files.
    """
    model = base.model
    plain = PromptFormat(copy.copy(base.tokenizer), model, model.generation_config)
    formats: dict[str | None, PromptFormat] = {
        name: format_beside(plain, adapter) for name, adapter in adapters.items()
    }
    if len(adapters) == 1:
        (one,) = formats.values()
        base.tokenizer.chat_template = one.tokenizer.chat_template
        model.generation_config = one.generation_config
    formats[None] = plain
    first = next(iter(formats.values()))
    if first.tokenizer.chat_template and not plain.tokenizer.chat_template:
        tokenizer = copy.copy(plain.tokenizer)
        tokenizer.chat_template = first.tokenizer.chat_template
        formats[None] = replace(plain, tokenizer=tokenizer, lender=first.adapter)
    return formats

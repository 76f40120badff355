"""What a GGUF says of how texts are read and written: tokens and chats."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qlora_kit.gguf.chat import chat_metadata
from qlora_kit.gguf.file import Value
from qlora_kit.gguf.vocabulary import vocabulary


@dataclass(frozen=True)
class Texts:
    """Keys and values, and what a user should know."""

    fields: tuple[tuple[str, Value], ...]
    notes: tuple[str, ...]
    strips: bool
    """whether spaces behind control tokens go away, which the model's name decides on"""


def texts(tokenizer: Any, rows: int, ends: Collection[int], bos: int | None) -> Texts:
    """What belongs to the GGUF of a model whose embedding has `rows` rows.

    Answers stop at `ends`, `bos` is the config's. Errors: `TokenizerError`.
    """
    words = vocabulary(tokenizer, rows, ends, bos)
    fields = (*words.metadata(), *chat_metadata(tokenizer))
    return Texts(fields, tuple(words.warnings()), words.strips)

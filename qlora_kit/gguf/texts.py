"""What belongs to a GGUF of how texts are read and written: tokens, chats, and Ollama's file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qlora_kit.gguf.chat import chat_metadata
from qlora_kit.gguf.file import Value
from qlora_kit.gguf.modelfile import MODELFILE, modelfile
from qlora_kit.gguf.vocabulary import vocabulary

MOST_CONTEXT = 8192
"""Tokens of context that the Modelfile asks for at most: Ollama allocates its cache for all."""


@dataclass(frozen=True)
class Texts:
    """Keys and values, what a user should know, and the files beside a GGUF: names and texts."""

    fields: tuple[tuple[str, Value], ...]
    notes: tuple[str, ...]
    beside: dict[str, str]


def texts(
    tokenizer: Any, rows: int, ends: Collection[int], bos: int | None, file: str, context: int
) -> Texts:
    """What belongs to the GGUF `file` of a model whose embedding has `rows` rows.

    Answers stop at `ends`, `bos` is the config's; `context` is the model's, in tokens.
    Errors: `TokenizerError`.
    """
    words = vocabulary(tokenizer, rows, ends, bos)
    said = modelfile(
        tokenizer,
        ends,
        min(context, MOST_CONTEXT),
        model=file,
        adds_bos=words.flags["add_bos_token"],
    )
    fields = (*words.metadata(), *chat_metadata(tokenizer))
    return Texts(fields, tuple(words.warnings()), {MODELFILE: said})

"""What belongs to a GGUF of how texts are read and written: tokens, chats, and Ollama's file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qlora_kit.gguf.chat import chat_metadata
from qlora_kit.gguf.file import Value
from qlora_kit.gguf.modelfile import MODELFILE, modelfile
from qlora_kit.gguf.vocabulary import vocabulary


@dataclass(frozen=True)
class Texts:
    """Keys and values, what a user should know, and the files beside a GGUF: names and texts."""

    fields: tuple[tuple[str, Value], ...]
    notes: tuple[str, ...]
    beside: dict[str, str]
    strips: bool
    """whether spaces behind control tokens go away, which the model's name decides on"""


def texts(
    tokenizer: Any, rows: int, ends: Collection[int], bos: int | None, file: str, context: int
) -> Texts:
    """What belongs to the GGUF `file` of a model whose embedding has `rows` rows.

    Answers stop at `ends`, `bos` is the config's; `context` is the model's, in tokens.
    Errors: `TokenizerError`.
    """
    words = vocabulary(tokenizer, rows, ends, bos)
    said = modelfile(tokenizer, ends, context, model=file)
    fields = (*words.metadata(), *chat_metadata(tokenizer))
    return Texts(fields, tuple(words.warnings()), {MODELFILE: said}, words.strips)

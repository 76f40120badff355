"""The tokens of a GGUF: a text of its own for each row of the embedding, and what it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any

from qlora_kit.errors import TokenizerError

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""Sentencepiece's tokens of single bytes."""


class TokenType(IntEnum):
    """What a token is, in the numbers of a GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def token_list(backend: Mapping[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """The text of each row's token and what it is. Errors: `TokenizerError` for too few rows."""
    model = backend["model"]
    known: dict[int, str] = {}
    for text, number in model["vocab"].items():
        # A vocabulary may have two names for a byte, of which llama.cpp asks for this one.
        if number not in known or text in BYTES:
            known[number] = text
    types = dict.fromkeys(known, TokenType.NORMAL)
    for one in backend["added_tokens"]:
        if known.setdefault(one["id"], one["content"]) != one["content"]:
            raise TokenizerError(
                f"the token {one['id']} is both {known[one['id']]!r} and {one['content']!r}",
                "give the added token an id of its own",
            )
        types[one["id"]] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    for text in BYTES if model["byte_fallback"] else ():
        if text in model["vocab"]:
            types[model["vocab"][text]] = TokenType.BYTE
    if not is_byte_level(backend["pre_tokenizer"]) and model["unk_token"] in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    if (last := max(known, default=0)) >= rows:
        raise TokenizerError(
            f"the tokenizer has the token {last}, the embedding {rows} rows",
            "use the tokenizer that belongs to this model",
        )
    taken = set(known.values())
    texts = [known[row] if row in known else _free(f"[PAD{row}]", taken) for row in range(rows)]
    return texts, [types.get(row, TokenType.UNUSED) for row in range(rows)]


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def is_byte_level(step: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer writes bytes as characters."""
    return any(one["type"] == "ByteLevel" for one in steps_of(step))


def steps_of(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the ones that it applies one after another."""
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [one for part in inner for one in steps_of(part)]

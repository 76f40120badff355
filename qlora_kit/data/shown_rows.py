"""Rows token by token, as `show-data` shows them: pieces of text, trained on or not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.pairs import SIDES, is_pair
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import IGNORE, Encoded, Skipped, decoded


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are alike, and their text."""

    text: str
    trained: bool
    special: bool
    tokens: int


@dataclass(frozen=True)
class ShownRow:
    """One row, or why it is skipped; `part` counts the rows that a long text became.

    Of a pair there are two, and `side` says which.
    """

    where: str
    part: int
    parts: int
    truncated: bool
    skipped: str | None
    tokens: int
    trained_tokens: int
    control_tokens: int
    pieces: tuple[Piece, ...]
    side: str = ""


def shown_row(row: Row, outcome: list[Encoded] | Skipped, tokenizer: Any) -> list[ShownRow]:
    """What `outcome`, the encodings of a row or why there are none, shows of it."""
    if isinstance(outcome, Skipped):
        return [ShownRow(row.where, 1, 1, False, outcome.reason, 0, 0, 0, (_text_of(row),))]
    return [
        ShownRow(
            where=row.where,
            part=number,
            parts=len(outcome),
            truncated=one.truncated,
            skipped=None,
            tokens=len(one.input_ids),
            trained_tokens=len(one.labels) - one.labels.count(IGNORE),
            control_tokens=sum(piece.tokens for piece in pieces if piece.special),
            pieces=pieces,
            side=SIDES[number - 1] if is_pair(row.content) else "",
        )
        for number, one in enumerate(outcome, 1)
        for pieces in [tuple(_pieces(one, tokenizer))]
    ]


def _text_of(row: Row) -> Piece:
    """A skipped row's text as it was read."""
    if is_pair(row.content):
        return Piece(
            "\n".join(f"{side}: {_written(row.content[side])}" for side in SIDES), False, False, 0
        )
    return Piece(_written(row.content), trained=False, special=False, tokens=0)


def _written(content: dict[str, Any]) -> str:
    turns = content.get("messages")
    if turns is None:
        return str(content.get("text") or content["prompt"] + content["completion"])
    return "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in turns)


def _pieces(row: Encoded, tokenizer: Any) -> list[Piece]:
    """The row's text in pieces; each is what its tokens add to the text before them."""
    special = {index for index, t in tokenizer.added_tokens_decoder.items() if t.special}
    kinds = [
        (label != IGNORE, token in special)
        for token, label in zip(row.input_ids, row.labels, strict=True)
    ]
    pieces: list[Piece] = []
    done, before = 0, ""
    for kind, group in itertools.groupby(kinds):
        size = len(list(group))
        done += size
        text = decoded(tokenizer, row.input_ids[:done])
        pieces.append(Piece(text[len(before) :], kind[0], kind[1], size))
        before = text
    return pieces

"""What a conversation tells whoever shows it."""

from __future__ import annotations

from typing import NamedTuple


class Began(NamedTuple):
    """Answers begin, of the adapters or the base with these names."""

    names: tuple[str, ...]


class Piece(NamedTuple):
    """More of the answer at this place among those that began."""

    place: int
    text: str


class Ended(NamedTuple):
    """An answer has ended; `why` is None where it did so by itself, at an end or a stop."""

    place: int
    why: str | None


class Note(NamedTuple):
    """What a user should know."""

    text: str


class Left(NamedTuple):
    """The conversation is over."""


Event = Began | Piece | Ended | Note | Left

"""One field of a config.json: whether a value will do, and what will, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST = 10**15


class Field(NamedTuple):
    """Whether a value will do, and what will, in words."""

    accepts: Callable[[Any], bool]
    allowed: str


def whole(low: int, high: int = LARGEST) -> Field:
    """A whole number within bounds."""
    return Field(lambda value: type(value) is int and low <= value <= high, _range(low, high))


def number(low: float, high: float = LARGEST, *, above: bool = False) -> Field:
    """A number within bounds; with `above` not the lower one itself."""

    def accepts(value: Any) -> bool:
        is_number = type(value) in (int, float) and low <= value <= high
        return is_number and not (above and value == low)

    shown = f"a number above {low:g} and at most {high:g}" if above else _range(low, high, "number")
    return Field(accepts, shown)


def or_null(field: Field) -> Field:
    """What another field takes, or null."""
    return Field(lambda value: value is None or field.accepts(value), f"{field.allowed} or null")


def list_of(field: Field, limit: int) -> Field:
    """A list of up to so many values of a field."""
    return Field(
        lambda value: (
            isinstance(value, list) and len(value) <= limit and all(map(field.accepts, value))
        ),
        f"a list of at most {limit}, each {field.allowed}",
    )


def one_of(*values: str) -> Field:
    """One of some texts."""
    return Field(
        lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}"
    )


def either(first: Field, second: Field) -> Field:
    """What one of two fields takes."""
    return Field(
        lambda value: first.accepts(value) or second.accepts(value),
        f"{first.allowed}, or {second.allowed}",
    )


def _range(low: float, high: float, what: str = "whole number") -> str:
    return f"a {what} from {low:g} to {high:g}"

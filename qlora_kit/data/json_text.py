"""JSON as its standard has it, and values in which an absent field and a null one are the same.

Python's parser takes NaN, keeps the last of two equal keys, and builds what is nested too deep for
the code that reads it afterwards; each of these is refused here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Objects and arrays inside one another; a tool's parameters have about ten."""


class JsonError(ValueError):
    """Text that a JSON parser takes and JSON does not allow."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f'the key "{twice[:40]}" stands twice in one object')
    return made


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
"""Raises `JsonError` beside what Python's own raises."""


def loads(text: str) -> Any:
    """The value of a JSON text; `ValueError` (also `JsonError`) with the reason."""
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise JsonError("it is nested too deep") from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Errors: `JsonError` for more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise JsonError(f"it is nested deeper than {MAX_DEPTH} levels")


def present(value: Any) -> Any:
    """A copy without the fields that are null, at every depth: tables fill absent ones with it.

    So does pandas with NaN. A null in an array stays, for nothing fills arrays. The value is no
    deeper than `MAX_DEPTH`.
    """
    if isinstance(value, dict):
        return {name: present(item) for name, item in value.items() if not _is_null(item)}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_plain(value: Any) -> bool:
    """Whether JSON can hold the value: no bytes, dates or infinite numbers, as Parquet has."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or (
        isinstance(value, (str, bool, int, float))
        and not (isinstance(value, float) and not math.isfinite(value))
    )

"""A JSON object out of a file that nobody vouches for: bounded, flat, finite and unambiguous.

`json` takes more than JSON: NaN, a number that overflows to infinity, a key that stands twice (of
which another reader may take the other value), nesting up to the edge of the stack. All of it is
refused here, with the file and the place.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.errors import InputError, ModelError
from qlora_kit.files.kind import refuse_kind

DEPTH_LIMIT = 64  # of objects and lists in each other
SETTINGS_LIMIT = 16 * 1024**2
"""Bytes of a file of settings; a vocabulary has its own limit."""


def read_json(
    path: Path, error: type[InputError] = ModelError, limit: int = SETTINGS_LIMIT
) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes: no key twice, every number finite.

    Errors: `error` with the file and the place for anything else, `UnsafeInputError` for a pickle.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path}: has {size} bytes", f"a file like this has at most {limit}")
        read = path.read_bytes()
        refuse_kind(path, error, start=read)
        content = json.loads(
            read.decode(),
            object_pairs_hook=unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file", "complete the directory") from missing
    except UnicodeDecodeError as bad:
        raise error(f"{path}: byte {bad.start} is not UTF-8", "save the file as UTF-8") from bad
    except json.JSONDecodeError as bad:
        raise error(
            f"{path}:{bad.lineno}: not JSON: {bad.msg} (column {bad.colno})",
            "fetch the file again or correct it",
        ) from bad
    except _JSONFaultError as bad:
        raise error(f"{path}: {bad}", "correct the file") from bad
    except (RecursionError, ValueError) as bad:
        raise error(
            f"{path}: is nested too deeply or holds a number too long", "correct it"
        ) from bad
    if not isinstance(content, dict):
        raise error(f"{path}: holds {type(content).__name__}, not an object", "correct the file")
    if is_deep(content):
        raise error(f"{path}: is nested more than {DEPTH_LIMIT} levels deep", "correct it")
    return content


def is_deep(content: Any) -> bool:
    """Whether objects and lists of JSON stand in each other above `DEPTH_LIMIT`.

    What `json` reads at the edge of the stack fails later, where it is shown or copied.
    """
    level: list[Any] = [content]
    for _ in range(DEPTH_LIMIT):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for one in inner for value in one if isinstance(value, (dict, list))]
    return bool(level)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some JSON pairs. Errors: `ValueError` for a key that stands twice."""
    once = dict(pairs)
    if len(once) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _JSONFaultError(f"the key {twice[:60]!r} stands twice")
    return once


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _JSONFaultError(f"holds {text[:60]}, which is no finite number")
    return number


class _JSONFaultError(ValueError):
    """What `json` reads and no other reader would: the second of two values, or what is none."""

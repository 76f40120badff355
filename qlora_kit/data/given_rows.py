"""Rows that a program hands over in place of a file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows that a program hands over in place of a file: a list of dicts, or a `datasets.Dataset`.

    They are read as JSON lines are, so that a row is what it would be in a file.
    """

    rows: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        return "rows"

    @property
    def name(self) -> str:
        """What a run writes down for `--data`: the same rows have the same name."""
        return f"rows:{self.digest[:12]}"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all rows as JSON lines. Errors: `DataError` for what is not JSON."""
        found = hashlib.sha256()
        for _, line in self.lines():
            found.update(line + b"\n")
        return found.hexdigest()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The number of each row, from 1, and its JSON. Errors: `DataError`."""
        for number, row in enumerate(self.rows, 1):
            value = dict(row) if isinstance(row, Mapping) else row
            try:
                text = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"{self}:{number}: is no JSON: {error}",
                    "give dicts of texts, numbers, booleans, lists and dicts",
                ) from error
            yield number, text.encode("utf-8", errors="surrogatepass")


def given_rows(option: str, value: Any) -> GivenRows | None:
    """The rows that a program gives for an option; None where it names files.

    Errors: `ConfigError` for what is no list of rows, `DataError` for one that is empty.
    """
    is_list = isinstance(value, (list, tuple))
    if value is None or isinstance(value, (str, os.PathLike)):
        return None
    if is_list and value and all(isinstance(one, str) for one in value):
        return None  # several files
    # Of a `datasets.Dataset` no more is asked than that its rows can be gone through again.
    if not is_list and (isinstance(value, Mapping) or not hasattr(value, "__getitem__")):
        raise ConfigError(
            f"{option} is given a {type(value).__name__}",
            "give a list of dicts, a datasets.Dataset (of several splits one), or the name of a "
            "file",
        )
    if not len(value):
        raise DataError(f"{option}: holds no row", "give at least one")
    return GivenRows(value)

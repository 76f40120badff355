"""Every name that an option goes by outside Python."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_kit.config import Options, flag_of


def fields_of(
    groups: Sequence[type[Options]],
) -> dict[str, tuple[type[Options], dataclasses.Field[Any]]]:
    """Every option by its outside name; where two groups share a name, the first one has it."""
    found: dict[str, tuple[type[Options], dataclasses.Field[Any]]] = {}
    for group in groups:
        for field in dataclasses.fields(typing.cast(Any, group)):
            found.setdefault(flag_of(field), (group, field))
    return found


def spellings_of(
    fields: Mapping[str, tuple[type[Options], dataclasses.Field[Any]]],
) -> dict[str, str]:
    """Every accepted spelling of a flag or key, with the option's name."""
    spelling = {"config": "config", "debug": "debug"}
    for name, (_, field) in fields.items():
        for other in (name, field.name, *field.metadata["option"]["aliases"]):
            spelling.setdefault(other, name)
    return spelling


def closest(name: str, known: Iterable[str]) -> str:
    """`, did you mean ...?` with the closest known name, or nothing."""
    plain = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(plain, list(known), n=1, cutoff=0.6)
    return f", did you mean {'--' if name.startswith('--') else ''}{near[0]}?" if near else ""

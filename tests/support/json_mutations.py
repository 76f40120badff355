"""Seeded damage to a JSON document: each change takes it and a random state, and edits one place.

A change may leave a placeholder (`RAW`) in the document, and give the text that stands there: what
`json.dumps` would not write. `edited` applies one to a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Change = Callable[[Any, Random], str | None]
RAW = "@@raw@@"
"""A text that stands for JSON which `json.dumps` would not write."""

NUMBERS = (
    "0",
    "-1",
    "1.5",
    "1e999",
    "NaN",
    "-Infinity",
    "1e308",
    str(2**31),
    str(2**63),
    "9" * 400,
)
TEXTS = (
    "",
    "\0",
    "\ud800",
    "../../../etc/hosts",
    "/dev/zero",
    "{{ 7 * 7 }}",
    "%s%n{0.x}",
    "\x1b[2J",
)
TEXTS = (
    *TEXTS,
    r"([\w.]+)+!",
    "None",
    "x" * 2**20,
    "\u202e",
    "model.layers.0",
    "a/b",
    "C:\\x",
    "*",
)
VALUES = ("null", "true", "false", "3", "2.5", '"text"', "[]", "{}", "[null]", '{"a": 1}', "[[1]]")


def place(document: Any, draw: Random) -> tuple[Any, Any]:
    """An object or a list of the document, and a key of it; every depth is drawn about as often."""
    owner, key = {"": document}, ""
    while isinstance(owner[key], (dict, list)) and owner[key]:
        if key != "" and draw.random() < 0.3:
            break
        owner = owner[key]
        key = draw.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    return owner, key


def places(document: Any, wanted: type | tuple[type, ...]) -> list[tuple[Any, Any]]:
    """Every owner and key of a value of a type."""
    found, rest = [], [({"": document}, "")]
    while rest:
        owner, key = rest.pop()
        value = owner[key]
        if isinstance(value, wanted) and not isinstance(value, bool):
            found.append((owner, key))
        if isinstance(value, (dict, list)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            rest += [(value, one) for one in keys]
    return found


def edited(text: str, change: Callable[[Any], str | None]) -> str:
    """JSON after `change`, which may give a text for its placeholder."""
    document = json.loads(text)
    raw = change(document)
    return json.dumps(document).replace(f'"{RAW}"', raw or "null")


def value_of_another_type(document: Any, draw: Random) -> str:
    owner, key = place(document, draw)
    owner[key] = RAW
    return draw.choice(VALUES)


def key_dropped(document: Any, draw: Random) -> None:
    owner, key = place(document, draw)
    del owner[key]


def key_renamed(document: Any, draw: Random) -> None:
    owners = [owner[key] for owner, key in places(document, dict) if owner[key]]
    owner = draw.choice(owners)
    key = draw.choice(list(owner))
    owner[draw.choice([key + "x", key[:-1], key.upper(), *TEXTS])] = owner.pop(key)


def key_added(document: Any, draw: Random) -> str:
    more = ("auto_map", "use_dora", "num_local_experts", "vision_config", "quantization_config")
    more = (*more, "rope_scaling", "pad_token_id", "layers_to_transform", "rank_pattern")
    document[draw.choice([*more, "exclude_modules", "layer_types", "dtype", "modules_to_save"])] = (
        RAW
    )
    return draw.choice([*VALUES, *NUMBERS])


def number_changed(document: Any, draw: Random) -> str | None:
    owner, key = draw.choice(places(document, (int, float)) or [({}, "")])
    owner[key] = RAW
    return draw.choice(NUMBERS)


def text_changed(document: Any, draw: Random) -> None:
    owner, key = draw.choice(places(document, str) or [({}, "")])
    owner[key] = draw.choice(TEXTS)


def list_changed(document: Any, draw: Random) -> None:
    lists = [owner[key] for owner, key in places(document, list)]
    if lists:
        one = draw.choice(lists)
        one[:] = draw.choice(
            [one * 3, one[:-1], one[1:], [], list(reversed(one)), [list(one), None]]
        )


def emptied_inside(document: Any, draw: Random) -> None:
    owner, key = draw.choice(places(document, (dict, list)))
    owner[key].clear()


def nested_deeply(document: Any, draw: Random) -> str:
    owner, key = place(document, draw)
    owner[key] = RAW
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    count = draw.choice([50, draw.randrange(900, 1000), 100_000])
    return opening * count + "1" + closing * count


def key_twice(document: Any, draw: Random) -> str:
    key = draw.choice(list(document))
    value = json.dumps(document.pop(key))
    document["x"] = RAW
    return f"0, {json.dumps(key)}: {value}, {json.dumps(key)}: {draw.choice([value, *VALUES])}"


CHANGES = (value_of_another_type, key_dropped, key_renamed, key_added, number_changed)
CHANGES = (*CHANGES, text_changed, list_changed, emptied_inside, nested_deeply, key_twice)

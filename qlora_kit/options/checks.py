"""Checks of single values, and readings of what other tools spell otherwise.

A check gives None for a good value, else what is allowed: `at least 1`. A reading is called with
what was given, and gives what it means. Every number has a largest value, whatever a run could do
with a larger one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], str | None]
"""Gives None for a good value, else what is allowed: `at least 1`."""

SIZE_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("iB", 1024), ("B", 1000))
}
SMALLEST_SIZE, LARGEST_SIZE = 2**20, 2**50
LONGEST_NAME = 4096
"""Characters of a name or a path: the system takes no longer one."""
TRUE, FALSE = ("true", "on", "yes"), ("false", "off", "no")
"""How a switch is spelt where it has a value; YAML reads all of them so."""


@dataclass(frozen=True)
class OneOf:
    """A check for a closed list of values; `--help` lists them."""

    allowed: tuple[object, ...]

    def __call__(self, value: Any) -> str | None:
        """As every check: None, or what is allowed."""
        return None if value in self.allowed else str(self)

    def __str__(self) -> str:
        *others, last = map(str, self.allowed)
        return f"{', '.join(others)} or {last}" if others else last


def one_of(*allowed: object) -> OneOf:
    """A check for a closed list of values."""
    return OneOf(allowed)


def between(
    low: float, high: float, *, open_low: bool = False, open_high: bool = False, tiny: float = 0
) -> Check:
    """A check for a number in a range; an open end is not part of it.

    Every number has a largest value: beyond it lie loops that do not end and sizes that fit
    nowhere. What is closer to 0 than `tiny`, and not 0, has no effect in the arithmetic it enters.
    """
    allowed = f"{'above' if open_low else 'at least'} {_plain(low)}"
    allowed += f" and {'below' if open_high else 'at most'} {_plain(high)}"

    def check(value: float) -> str | None:
        if 0 < abs(value) < tiny:
            zero = "" if open_low else "0, or "
            return f"{zero}at least {_plain(tiny)} and at most {_plain(high)}"
        good = (low < value if open_low else low <= value) and (
            value < high if open_high else value <= high
        )
        return None if good else allowed

    return check


def a_name(what: str = "a name or a path") -> Check:
    """A check for a text that names something: not blank, and no longer than a path may be."""

    def check(value: str) -> str | None:
        if len(value) > LONGEST_NAME:
            return f"{what} of at most {LONGEST_NAME} characters"
        return None if value.strip() else what

    return check


def also(meanings: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A reading of single values: `{"false": "none"}` takes false, in any case, for none."""

    def read(value: Any) -> Any:
        if isinstance(value, (bool, int, str)):
            # A whole number may have more digits than Python turns into text.
            key = str(value).strip().lower() if not is_long(value) else ""
            return meanings.get(key, value)
        return value

    return read


def joined(value: Any) -> Any:
    """A reading of a list of names as the text that has commas between them; of none, as `none`."""
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return ",".join(value) or "none"
    return value


def listed_names(text: str) -> list[str] | None:
    """The names in a text that has commas between them; None for a regex, by its characters."""
    if not re.fullmatch(r"[\w.,\- ]+", text):
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def size_bytes(text: str) -> int:
    """Bytes of a size: `8GiB`, `8 GB`, `500MiB`, `1.5GiB` or plain bytes. Errors: `ValueError`.

    Less than 1 MiB is refused: who writes 8 means GB.
    """
    units = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,9})?)\s*([a-z]*)", text.strip().lower())
    size = round(float(found[1]) * units.get(found[2], 0)) if found else 0
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise ValueError(
            "a size of 1 MiB or more, and 1024 TiB at most, as 8GiB, 8GB, 500MiB or a number of "
            "bytes"
        )
    return size


def size_text(count: int) -> str:
    """Bytes in the largest fitting unit of 1024, such as `1.50 GiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.2f} {units[0]}"


def a_size(value: str) -> str | None:
    """A check for what `size_bytes` reads."""
    try:
        size_bytes(value)
    except ValueError as error:
        return str(error)
    return None


def is_long(value: Any) -> bool:
    """Whether a whole number has more digits than Python makes text of."""
    return isinstance(value, int) and value.bit_length() > 10_000


def _plain(number: float) -> str:
    """A bound as one writes it."""
    return str(number) if isinstance(number, int) else f"{number:g}"


LARGEST_ALPHA = 1e9
LARGEST_RANK = 2**16
"""As `lora/adapter_files.py` takes it from an adapter; far above it a scale is no fp32 number."""
MOST_ROWS, MOST_STEPS, MOST_TOKENS = 2**16, 10**9, 10**7
"""Of rows at a time, of steps of a run, and of tokens in a row: far above what any run has."""
MOST_DRAWN = 10**6
"""Of tokens that are generated."""
MOST_DATA = 10**15
"""Of rows or tokens of a data set whose time is asked for."""
SEEDS = between(0, 2**63 - 1)

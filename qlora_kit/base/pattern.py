"""Regexes out of files and flags, matched where they can be stopped.

On a text that does not match, `re` tries every way to divide it among nested repeats: ten
characters of a pattern can keep it busy for years, and nothing in its own process interrupts it.
So a regex that is more than a name is matched in a second process (`process/worker.py`), within
`TIME_LIMIT_S` of the processor and `MEMORY_LIMIT`. It is the same `re`, so that a pattern means
what it means to PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.process.worker import MemoryLimitError, TimeLimitError, Worker

TIME_LIMIT_S = 3.0
MEMORY_LIMIT = 1024**3
PLAIN = re.compile(r"[\w.\-\\^$]*")
"""Without repeats and alternatives there is one way to match."""
PLAIN_LIMIT = 2000
"""Patterns that are compiled here, 0.1 ms each."""

Matches = list[dict[str, dict[str, str | None]]]

_worker = Worker("qlora_kit.base.pattern:answer")


def full_matches(patterns: Sequence[str], names: Sequence[str], form: str = "{}") -> Matches:
    """For each pattern the names that it matches as a whole, with its named groups.

    `form` is a regex into which each pattern is put. Errors: `ConfigError` for what is no regex,
    or cannot be matched within the limits, `ResourceError` where no process can be started.
    """
    question = [[form.format(pattern) for pattern in patterns], list(names)]
    if len(patterns) <= PLAIN_LIMIT and all(map(PLAIN.fullmatch, patterns)):
        found = answer(question)
    else:
        try:
            found = _worker.ask(question, seconds=TIME_LIMIT_S, memory=MEMORY_LIMIT)
        except (TimeLimitError, MemoryLimitError) as error:
            raise ConfigError(
                f"{_shown(patterns)} cannot be matched within {TIME_LIMIT_S:g} s and "
                f"{MEMORY_LIMIT // 1024**2} MiB",
                "give names, or a regex without nested repeats",
            ) from error
        except OSError as error:
            raise ResourceError(
                f"no process for a regex can be started: {error.strerror or 'it ends at once'}",
                "end other processes, or raise the limits on them (ulimit)",
            ) from error
    if isinstance(found, dict):
        raise _no_regex(patterns[found["bad"]], found["why"])
    return list(found)


def answer(question: Sequence[Sequence[str]]) -> Matches | dict[str, Any]:
    """The matches of regexes and names, or which regex is none, and why."""
    regexes, names = question
    found: Matches = []
    for number, regex in enumerate(regexes):
        try:
            compiled = re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            return {"bad": number, "why": str(error)}
        matches = ((name, compiled.fullmatch(name)) for name in names)
        found.append({name: match.groupdict() for name, match in matches if match})
    return found


def _no_regex(pattern: str, why: str) -> ConfigError:
    return ConfigError(
        f"{_shown([pattern])} is not a regex: {why[:100]}",
        "give names separated by commas, or a valid regex",
    )


def _shown(patterns: Sequence[str]) -> str:
    more = f" and {len(patterns) - 1} more" if len(patterns) > 1 else ""
    return repr(patterns[0][:100]) + more

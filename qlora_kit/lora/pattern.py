"""Regexes out of files and flags, matched where they can be stopped.

On a text that does not match, `re` tries every way to divide it among nested repeats: ten
characters of a pattern can keep it busy for years, and nothing in its own process interrupts it.
So a regex that is more than a name is matched by a process of its own, in about 20 ms, which has
`TIME_LIMIT_S` and `MEMORY_LIMIT`. It is the same `re`, so that a pattern means what it means to
PEFT.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from qlora_kit.errors import ConfigError

TIME_LIMIT_S = 3.0
MEMORY_LIMIT = 1024**3
PLAIN = re.compile(r"[\w.\-\\^$]*")
"""Without repeats and alternatives there is one way to match."""
PLAIN_LIMIT = 2000
"""Patterns that are compiled here, 0.1 ms each."""

Matches = list[dict[str, dict[str, str | None]]]
_CHILD = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))
patterns, names = json.load(sys.stdin)
found = []
for number, pattern in enumerate(patterns):
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        json.dump({{"bad": number, "why": str(error)}}, sys.stdout)
        sys.exit()
    matches = ((name, compiled.fullmatch(name)) for name in names)
    found.append({{name: match.groupdict() for name, match in matches if match}})
json.dump({{"found": found}}, sys.stdout)
"""


def full_matches(patterns: Sequence[str], names: Sequence[str], form: str = "{}") -> Matches:
    """For each pattern the names that it matches as a whole, with its named groups.

    `form` is a regex into which each pattern is put. Errors: `ConfigError` for what is no regex,
    or cannot be matched within the limits.
    """
    whole = [form.format(pattern) for pattern in patterns]
    if len(patterns) <= PLAIN_LIMIT and all(map(PLAIN.fullmatch, patterns)):
        found: Matches = []
        for pattern, one in zip(patterns, whole, strict=True):
            try:
                compiled = re.compile(one)
            except re.error as error:
                raise _no_regex(pattern, str(error)) from error
            matches = ((name, compiled.fullmatch(name)) for name in names)
            found.append({name: match.groupdict() for name, match in matches if match})
        return found
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([whole, list(names)]),
            capture_output=True,
            text=True,
            check=True,
            timeout=TIME_LIMIT_S,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"{_shown(patterns)} cannot be matched within {TIME_LIMIT_S:g} s and "
            f"{MEMORY_LIMIT // 1024**2} MiB",
            "give names, or a regex without nested repeats",
        ) from error
    answer = json.loads(done.stdout)
    if "bad" in answer:
        raise _no_regex(patterns[answer["bad"]], answer["why"])
    return list(answer["found"])


def _no_regex(pattern: str, why: str) -> ConfigError:
    return ConfigError(
        f"{_shown([pattern])} is not a regex: {why[:100]}",
        "give names separated by commas, or a valid regex",
    )


def _shown(patterns: Sequence[str]) -> str:
    more = f" and {len(patterns) - 1} more" if len(patterns) > 1 else ""
    return repr(patterns[0][:100]) + more

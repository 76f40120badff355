"""Which linears are not quantized: by `--skip_modules`, and by what a config.json lists.

What a user names has to be there. What a file lists is compared as text, never run as a regex, and
whatever it lists beyond the text model (towers, the head) is no concern of a decoder's linears.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Sequence

from qlora_kit.base.pattern import full_matches
from qlora_kit.errors import ConfigError

PREFIX = re.compile(r"((model|language_model|text_model)\.)*")
"""What stands before a decoder's layers, in one kind of checkpoint or another."""
LISTED_LIMIT = 10_000
"""Names of a list that are looked at."""


def listed_modules(listed: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a list out of a config.json stands for, or a module around them.

    As transformers has it (`should_convert_module`), of texts: from the start up to a dot, or the
    end of the name.
    """
    texts = {PREFIX.sub("", one, count=1) for one in itertools.islice(listed, LISTED_LIMIT)} - {""}
    starts, ends = tuple(f"{text}." for text in texts), tuple(texts)
    short = ((name, PREFIX.sub("", name, count=1)) for name in names)
    return frozenset(
        name for name, text in short if f"{text}.".startswith(starts) or text.endswith(ends)
    )


def skipped_linears(
    linears: Sequence[str], skip_modules: str | tuple[str, ...] | None
) -> frozenset[str]:
    """Those of `linears` that `--skip_modules` names: all below a name, or those a regex matches.

    A name stands for a linear, for the end or the start of its name, or for a module on the way.
    Errors: `ConfigError` listing the linears where a name or the regex matches nothing.
    """
    if skip_modules is None:
        return frozenset()
    if isinstance(skip_modules, str):
        (matched,) = full_matches([skip_modules], linears)
        if not matched:
            raise _no_match(skip_modules, linears)
        return frozenset(matched)
    matches = {one: {name for name in linears if f".{one}." in f".{name}."} for one in skip_modules}
    unmatched = [one for one, names in matches.items() if not names]
    if unmatched:
        raise _no_match(", ".join(unmatched), linears)
    return frozenset().union(*matches.values())


def _no_match(asked: str, linears: Collection[str]) -> ConfigError:
    counts: dict[str, int] = {}
    for name in linears:
        last = name.rpartition(".")[2]
        counts[last] = counts.get(last, 0) + 1
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return ConfigError(
        f"skip_modules {asked[:100]!r} matches no linear that is quantized",
        f"those are {listed}",
    )

"""Values by their outside names to the groups of options that a command has.

Flags, config files, a program's keyword arguments and what an adapter's run wrote down all come
through here.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_kit.errors import ConfigError, redacted
from qlora_kit.options.names import closest, fields_of, spellings_of
from qlora_kit.options.option import Options, flag_of

Group = TypeVar("Group", bound=Options)


@dataclass(frozen=True)
class Parsed:
    """The option groups of a command, and each one's fields that were given, not left alone."""

    groups: Mapping[type[Options], Options]
    given: Mapping[type[Options], frozenset[str]]
    config_file: str | None
    debug: bool

    def __getitem__(self, group: type[Group]) -> Group:
        return typing.cast(Group, self.groups[group])


def parse_values(values: Mapping[str, Any], groups: Sequence[type[Options]]) -> Parsed:
    """The groups of a program's keyword arguments; None leaves an option alone, as in a file.

    Errors: `ConfigError` with everything that is wrong, an unknown name among it.
    """
    spelling = spellings_of(fields_of(groups))
    named: dict[str, Any] = {}
    problems = []
    for word, value in values.items():
        name = spelling.get(word)
        if name is None or name in ("config", "debug"):
            problems.append(f"unknown option {word}{closest(word[:60], spelling)}")
        elif name in named:
            problems.append(f"{name} is given twice, as {word} too")
        elif value is not None:
            named[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    if problems:
        raise ConfigError("; ".join(problems), "correct or remove these names")
    made, given = make_groups(named, groups)
    return Parsed(made, given, None, debug=False)


def make_groups(
    values: Mapping[str, Any], groups: Sequence[type[Options]]
) -> tuple[dict[type[Options], Options], dict[type[Options], frozenset[str]]]:
    """The groups of values by their outside names, and the fields of each that have one.

    Errors: `ConfigError` with everything that is wrong in any of them.
    """
    made, given, problems = {}, {}, []
    fields = fields_of(groups)
    for group in groups:
        own = {
            field.name: values[name]
            for name, (owner, field) in fields.items()
            if owner is group and name in values
        }
        given[group] = frozenset(own)
        try:
            made[group] = group(**own)
        except ConfigError as error:
            problems.append(error.problem)
    if problems:
        raise ConfigError("; ".join(problems), "correct the values named above")
    return made, given


def refuse_tokens(parsed: Parsed) -> None:
    """Refuse a value that holds a token, for commands that write their options down.

    Errors: `ConfigError` naming the flag.
    """
    named = [
        flag_of(field)
        for group, options in parsed.groups.items()
        for field in dataclasses.fields(typing.cast(Any, options))
        if field.name in parsed.given[group]
        and redacted(str(getattr(options, field.name))) != str(getattr(options, field.name))
    ]
    if named:
        raise ConfigError(
            ", ".join(f"--{name} holds a token" for name in named),
            "name it otherwise: a token comes from the environment or the stored login alone",
        )

"""Flags and config files to option groups: the one argument parser of all commands.

Hyphens and underscores are the same, a flag beats the file, and an unknown flag or key is a
`ConfigError` with the closest known name. What an option is, and what it may be, stands in
the folder `config`; nothing of it is repeated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.options.checks import FALSE, TRUE, OneOf
from qlora_kit.options.option import Options, alternatives, flag_of, types_of
from qlora_kit.options.parsed import (
    MOST_PROBLEMS,
    Parsed,
    closest,
    fields_of,
    make_groups,
    spellings_of,
    version_line,
)
from qlora_kit.options.yaml_file import read_config


def parse(
    command: str,
    summary: str,
    groups: Sequence[type[Options]],
    argv: Sequence[str],
    beside: Sequence[type[Options]] = (),
) -> Parsed:
    """Read flags, and the `--config` file below them, into `groups`.

    The file may also hold options of the groups `beside`, which another command takes from it;
    they are checked alike. Everything that is wrong with values is reported at once.
    """
    fields = fields_of(groups)
    spelling = spellings_of(fields)
    parser = _parser(command, summary, groups)
    tokens = _with_known_names(argv, spelling, fields, parser)
    arguments = vars(parser.parse_args(tokens))
    config_file, debug = arguments.pop("config", None), arguments.pop("debug", False)
    stored = {}
    if config_file is not None:
        config_file = os.path.expanduser(config_file)
        stored = read_config(config_file, [*groups, *beside])
    try:
        made, given = make_groups({**stored, **arguments}, [*groups, *beside])
    except ConfigError as error:
        where = "" if config_file is None else f" (some may come from {config_file})"
        remedy = f"correct the values named above{where}, see --help"
        raise ConfigError(error.problem, remedy) from None
    return Parsed(made, given, config_file, debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.print_usage(sys.stderr)
        raise ConfigError(message, f"see `{self.prog} --help`")


def _parser(command: str, summary: str, groups: Sequence[type[Options]]) -> _Parser:
    parser = _Parser(
        prog=command,
        description=summary,
        usage=f"{command} [--config FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    known: set[str] = set()
    for group in groups:
        section = parser.add_argument_group(group.title)
        for field in dataclasses.fields(typing.cast(Any, group)):
            if flag_of(field) not in known:
                known.add(flag_of(field))
                _add(section, field, types_of(group)[field.name])
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("--version", action="store_true", help="show the version")
    return parser


def _add(section: argparse._ArgumentGroup, field: dataclasses.Field[Any], annotation: Any) -> None:
    details, name = field.metadata["option"], flag_of(field)
    default = details["shown_default"]
    if default is None and field.default is not None and field.default is not False:
        default = "on" if field.default is True else f"{field.default}"
    if default == "on":
        default = f"on; off by --no_{name}"
    facts = [str(details["check"])] if isinstance(details["check"], OneOf) else []
    facts += [f"default: {default}"] if default else []
    text = details["help"] + (f" ({'; '.join(facts)})" if facts else "")
    text = text.replace("%", "%%")
    flags = [f"--{other}" for other in (name, *details["aliases"])]
    if bool in alternatives(annotation):
        section.add_argument(*flags, dest=name, action="store_true", help=text)
        section.add_argument(
            *(f"--no_{flag[2:]}" for flag in flags),
            dest=name,
            action="store_false",
            help=argparse.SUPPRESS,
        )
        return
    metavar = details["metavar"] or _metavar(annotation)
    action = "append" if details["repeated"] else "store"
    section.add_argument(*flags, dest=name, metavar=metavar, action=action, help=text)


def _metavar(annotation: Any) -> str:
    kinds = alternatives(annotation)
    if float in kinds:
        return "X"
    if int in kinds:
        return "N"
    return "NAME"


def _with_known_names(
    argv: Sequence[str],
    spelling: Mapping[str, str],
    fields: Mapping[str, tuple[type[Options], dataclasses.Field[Any]]],
    parser: _Parser,
) -> list[str]:
    """The arguments with every flag in its underscore spelling; an unknown one is refused here.

    A value that starts with a hyphen is taken as it is, unless it is a flag of this command, so
    that `--lora_alpha -1` reaches its check.
    """
    tokens, rest, unknown = [], list(argv), []
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return ["--help"]
        if token == "--version":
            print(version_line())
            raise SystemExit(0)
        if not token.startswith("--") or token == "--":
            parser.error(f"unexpected argument {excerpt(token)!r}")
        flag, equals, value = token[2:].partition("=")
        flag = flag.replace("-", "_")
        known = spelling.get(flag) or spelling.get(flag.removeprefix("no_"))
        switch = known == "debug" or (
            known is not None and known in fields and _is_switch(fields[known])
        )
        if known is None or (flag not in spelling and not switch):
            unknown.append(token.partition("=")[0])  # not the value: it may be a secret
            if rest and not equals and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        name = ("no_" if flag not in spelling else "") + known
        if switch:
            negated = flag not in spelling
            if not equals and not negated and rest and rest[0].lower() in (*TRUE, *FALSE):
                equals, value = "=", rest.pop(0)
            if equals and negated:
                parser.error(f"--{flag} takes no value, got {excerpt(value)!r}")
            if equals and value.lower() not in (*TRUE, *FALSE):
                parser.error(f"--{flag} must be true or false, got {excerpt(value)!r}")
            if value.lower() in FALSE:
                name = f"no_{name}"
            if name != "no_debug":
                tokens.append(f"--{name}")
        elif equals or (rest and not _is_flag(rest[0], spelling)):
            tokens.append(f"--{name}={value if equals else rest.pop(0)}")
        else:
            after = f", and {rest[0]} is a flag (write --{flag}={rest[0]})" if rest else ""
            parser.error(f"--{flag} needs a value{after}")
    if unknown:
        told = unknown[:MOST_PROBLEMS]
        parser.error(
            "; ".join(f"unknown flag {flag}{closest(flag[:60], spelling)}" for flag in told)
        )
    return tokens


def _is_flag(token: str, spelling: Mapping[str, str]) -> bool:
    return token.startswith("--") and token[2:].replace("-", "_") in spelling


def _is_switch(entry: tuple[type[Options], dataclasses.Field[Any]]) -> bool:
    group, field = entry
    return bool in alternatives(types_of(group)[field.name])

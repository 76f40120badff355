"""Flags and config files to option groups: the one argument parser of all commands.

Hyphens and underscores are the same, a flag beats the file, and an unknown flag or key is a
`ConfigError` with the closest known name. What an option is, and what it may be, stands in
`config.py`; nothing of it is repeated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qlora_kit.config import (
    BaseConfig,
    Check,
    DataConfig,
    ExportConfig,
    GenerateConfig,
    LoRAConfig,
    Options,
    OutputConfig,
    TrainingConfig,
    alternatives,
    flag_of,
    types_of,
)
from qlora_kit.errors import ConfigError, UnsafeInputError

GROUP_TITLES = {
    BaseConfig: "model",
    DataConfig: "data",
    LoRAConfig: "adapters",
    TrainingConfig: "training",
    OutputConfig: "output",
    ExportConfig: "export",
    GenerateConfig: "generation",
}


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


def parse(
    command: str, summary: str, groups: Sequence[type[Options]], argv: Sequence[str]
) -> Parsed:
    """Read flags, and the `--config` file below them, into `groups`.

    Everything that is wrong with values is reported at once.
    """
    fields = _fields_of(groups)
    spelling = _spelling(fields)
    parser = _parser(command, summary, groups)
    tokens = _with_known_names(argv, spelling, fields, parser)
    arguments = vars(parser.parse_args(tokens))
    config_file, debug = arguments.pop("config", None), arguments.pop("debug", False)
    values = {**(read_config(config_file, groups) if config_file else {}), **arguments}
    made, given, problems = {}, {}, []
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
        where = f" (some may come from {config_file})" if config_file else ""
        raise ConfigError("; ".join(problems), f"correct the values named above{where}, see --help")
    return Parsed(made, given, config_file, debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.print_usage()
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
        section = parser.add_argument_group(GROUP_TITLES[group])
        for field in dataclasses.fields(typing.cast(Any, group)):
            if flag_of(field) not in known:
                known.add(flag_of(field))
                _add(section, field, types_of(group)[field.name])
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add(section: argparse._ArgumentGroup, field: dataclasses.Field[Any], annotation: Any) -> None:
    details, name = field.metadata["option"], flag_of(field)
    default = details["shown_default"]
    if default is None and field.default not in (None, (), False, ""):
        default = "on" if field.default is True else f"{field.default}"
    text = details["help"] + (f" (default: {default})" if default else "")
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
    # The last name of a flag is the shortest to read in --help's left column.
    metavar = details["metavar"] or _metavar(details["check"], annotation)
    section.add_argument(*flags, dest=name, metavar=metavar, help=text)


def _metavar(check: Check | None, annotation: Any) -> str:
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

    A flag's value is never taken for a flag, so that `--lora_alpha -1` and a prompt that starts
    with a hyphen reach their checks.
    """
    tokens, rest, unknown = [], list(argv), []
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return ["--help"]
        if not token.startswith("--") or token == "--":
            parser.error(f"unexpected argument {token!r}")
        flag, equals, value = token[2:].partition("=")
        flag = flag.replace("-", "_")
        known = spelling.get(flag) or spelling.get(flag.removeprefix("no_"))
        switch = known == "debug" or (
            known is not None and known in fields and _is_switch(fields[known])
        )
        if known is None or (flag not in spelling and not switch):
            unknown.append(token)
            if rest and not equals and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        name = ("no_" if flag not in spelling else "") + known
        if switch and equals:
            parser.error(f"--{flag} takes no value, got {value!r}")
        if switch:
            tokens.append(f"--{name}")
        elif equals or rest:
            tokens.append(f"--{name}={value if equals else rest.pop(0)}")
        else:
            parser.error(f"--{flag} needs a value")
    if unknown:
        parser.error(
            "; ".join(f"unknown flag {flag}{_closest(flag, spelling)}" for flag in unknown)
        )
    return tokens


def _is_switch(entry: tuple[type[Options], dataclasses.Field[Any]]) -> bool:
    group, field = entry
    return bool in alternatives(types_of(group)[field.name])


def _closest(name: str, known: typing.Iterable[str]) -> str:
    """`, did you mean ...?` with the closest known name, or nothing."""
    plain = name.split("=")[0].lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(plain, list(known), n=1, cutoff=0.6)
    return f", did you mean {'--' if name.startswith('--') else ''}{near[0]}?" if near else ""


def _fields_of(
    groups: Sequence[type[Options]],
) -> dict[str, tuple[type[Options], dataclasses.Field[Any]]]:
    """Every option by its outside name; where two groups share a name, the first one has it."""
    found: dict[str, tuple[type[Options], dataclasses.Field[Any]]] = {}
    for group in groups:
        for field in dataclasses.fields(typing.cast(Any, group)):
            found.setdefault(flag_of(field), (group, field))
    return found


def _spelling(
    fields: Mapping[str, tuple[type[Options], dataclasses.Field[Any]]],
) -> dict[str, str]:
    """Every accepted spelling of a flag or key, with the option's name."""
    spelling = {"config": "config", "debug": "debug"}
    for name, (_, field) in fields.items():
        for other in (name, field.name, *field.metadata["option"]["aliases"]):
            spelling.setdefault(other, name)
    return spelling


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags that make objects, and without keys that stand twice."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(
                f"{loader.name}:{line}: {key} stands here and in line {seen[key]}",
                "keep one of them",
            )
        seen[key] = line
    return {
        loader.construct_object(key): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _refuse_tag(loader: _StrictLoader, suffix: str, node: yaml.Node) -> typing.NoReturn:
    raise UnsafeInputError(
        f"{loader.name}:{node.start_mark.line + 1}: the tag {node.tag} would make an object",
        "a config file holds plain values only; remove the tag",
    )


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)
_StrictLoader.add_multi_constructor("", _refuse_tag)


def read_config(path: str, groups: Sequence[type[Options]]) -> dict[str, Any]:
    """The options of a config file by their outside names; their values are not yet checked."""
    spelling = _spelling(_fields_of(groups))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror}", "name a YAML file that can be read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: byte {error.start} is not UTF-8", "save the file as UTF-8"
        ) from error
    loader = _StrictLoader(text)
    loader.name = path
    try:
        node = loader.get_single_node()
        lines = {
            key.value: key.start_mark.line + 1
            for key, _ in (node.value if isinstance(node, yaml.MappingNode) else ())
        }
        content = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: not YAML: {getattr(error, 'problem', error)}", "correct that line"
        ) from error
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}", "write `name: value` lines")
    values, unknown = {}, []
    for key, value in content.items():
        name = spelling.get(str(key).replace("-", "_"))
        if name is None or name in ("config", "debug"):
            unknown.append(
                f"{path}:{lines.get(str(key), 1)}: unknown key {key}{_closest(str(key), spelling)}"
            )
        elif name in values:
            unknown.append(
                f"{path}:{lines.get(str(key), 1)}: {key} and another key both set {name}"
            )
        elif value is not None:
            values[name] = value
    if unknown:
        raise ConfigError("; ".join(unknown), "correct or remove these lines")
    return values

"""How an option is declared, read, checked and spelt: written once, used by every command.

A field made by `option` carries its default, its help, its check, its flag and its other
spellings. The command line, a YAML file, `--help`, the saved `config.yaml` and the constructors'
checks are all read off these fields. Values come as text, as Python's values, or as lists of text;
`convert` makes the field's type of them, and a constructor reports everything that is wrong at
once.

Left out: the options themselves (the folder `config`), and reading flags and files (`commands/`).
Imports the standard library only, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.options.checks import FALSE, TRUE, Check, OneOf, is_long

NUMBERS = ("a number", "a whole number")


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    aliases: Sequence[str] = (),
    check: Check | None = None,
    path: bool = False,
    repeated: bool = False,
    reads: Callable[[Any], Any] | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that is also a flag and a key of the config file.

    `flag` is the name outside Python where it differs from the field's; `shown_default` is what
    `--help` says where the default is worked out later. The value of a `path` may start with `~`.
    A flag that is `repeated` may be given more than once, and has all of its values.
    `reads` is called with what was given, and gives what it means where another tool spells it so.
    The value of a `secret` is in no error.
    """
    details = {
        "help": help,
        "flag": flag,
        "aliases": tuple(aliases),
        "check": check,
        "path": path,
        "repeated": repeated,
        "reads": reads,
        "metavar": metavar,
        "shown_default": shown_default,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata={"option": details})


class Options:
    """Base of the option groups: types and checks are applied when one is made."""

    title: typing.ClassVar[str]
    """What `--help` says above its options."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if not problems:
            problems = list(self._conflicts())
        if problems:
            raise ConfigError("; ".join(problems), "correct the values named above (see --help)")

    def _problems(self) -> typing.Iterator[str]:
        annotations = types_of(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            details, annotation = field.metadata["option"], annotations[field.name]
            value = getattr(self, field.name)
            if details["reads"] is not None:
                value = details["reads"](value)
            allowed = None
            if value is not None or type(None) not in alternatives(annotation):
                value, allowed = _checked(value, annotation, details)
            if allowed is not None:
                shown = "something else" if details["secret"] else _shown(value)
                yield f"{flag_of(field)} must be {allowed}, got {shown}"
                continue
            object.__setattr__(self, field.name, value)

    def _conflicts(self) -> typing.Iterator[str]:
        """Combinations that cannot work; looked at once every value is good by itself."""
        return iter(())


def _checked(value: Any, annotation: Any, details: Mapping[str, Any]) -> tuple[Any, str | None]:
    """A value as an option holds it, and None; or the value, and what is allowed instead."""
    check: Check | None = details["check"]
    try:
        value = convert(value, annotation)
        if details["path"] and isinstance(value, str):
            value = at_home(value)
    except ValueError as error:
        wanted = str(error)
        if check is None or not wanted.startswith(("text", *NUMBERS)):
            return value, wanted
        # What is of another type is told what would be right, range included.
        is_text = wanted.startswith("text")
        allowed = check("" if is_text else math.nan)
        if allowed is None or isinstance(check, OneOf):
            return value, allowed or wanted
        # "a name or a path", and what `wanted` says of its characters
        return value, allowed + wanted[4:] if is_text else f"{wanted} ({allowed})"
    return value, check(value) if check else None


def at_home(path: str) -> str:
    """A path with its `~` or `~user` replaced. Errors: `ValueError` where no home is known."""
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError("a path, and ~name the home of a user here (./~name is a file)")
    try:
        os.fsencode(whole)
    except UnicodeEncodeError:
        raise ValueError("a path in the characters of this locale, or with PYTHONUTF8=1") from None
    return whole


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The name of an option outside Python."""
    return str(field.metadata["option"]["flag"] or field.name)


def as_flat(group: Options) -> dict[str, Any]:
    """`{option name: value}` of one group; what has no value is left out."""
    flat = {}
    for field in dataclasses.fields(typing.cast(Any, group)):
        value = getattr(group, field.name)
        if value is not None:
            flat[flag_of(field)] = list(value) if isinstance(value, tuple) else value
    return flat


def convert(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type; `ValueError` with what is allowed where it is none."""
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        if isinstance(value, (list, tuple)):
            if all(isinstance(item, str) for item in value):
                return tuple(map(_as_text, value))
            raise ValueError("a list of names")
        if str not in kinds:
            raise ValueError("a list of names")
    kind = kinds[0]
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in (*TRUE, *FALSE):
            return value.strip().lower() in TRUE
        raise ValueError("true or false")
    if kind is int:
        # A leading zero is no octal, and 1_000 is 1000; what is far too long for any range is cut.
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", value.strip()):
            return int(value.strip()[:1000])
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError("a whole number")
    if kind is float:
        # YAML 1.1 reads 2e-4 as text, and Python takes the digits of every script for ours.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number or (isinstance(value, str) and value.isascii()):
            try:
                return float(value)
            except OverflowError:
                return math.inf
            except ValueError:
                pass
        raise ValueError("a number")
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _as_text(value)
    raise ValueError("text")


def _as_text(value: str | float) -> str:
    """A text that can be written, sent and handed to the system. Errors: `ValueError`."""
    if is_long(value):
        raise ValueError("text")
    text = str(value)
    try:
        # Where the locale is ASCII, what an argument has beyond it comes as escaped bytes.
        text = text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise ValueError("text in UTF-8") from None
    if "\0" in text:
        raise ValueError("text without NUL characters")
    return text


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have: `int | None` gives (int, NoneType)."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def types_of(group: type) -> Mapping[str, Any]:
    """The resolved annotation of every field, resolved once: that compiles each of them."""
    return _resolved(typing.cast("Any", group))


@functools.cache
def _resolved(group: Any) -> Mapping[str, Any]:
    return types.MappingProxyType(typing.get_type_hints(group))


def _shown(value: Any) -> str:
    """`value` for an error; a container of a file may be of any size, so only its kind is said."""
    if isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if is_long(value):
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, bool):
        return str(value).lower()
    return excerpt(str(value)) if value != "" else "nothing"

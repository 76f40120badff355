"""The fields of a record or of one turn of it: read by name, and those that nobody read.

Tools and calls are made alike in every spelling: a call is `{"type": "function", "function":
{"name", "arguments"}}` with an object for arguments, and so is a tool, as templates expect them.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_kit.data.json_text import is_plain, loads, present
from qlora_kit.errors import DataError

SHAPE_FIELDS = (
    *("messages", "prompt", "completion", "instruction", "output", "text"),
    *("chosen", "rejected"),
)
"""What a row of some shape must have: none of them is a misspelling of another field."""


class Fields:
    """An object out of a file, without its null fields; what is asked for counts as used.

    `where` is `file:line` and perhaps the place in the row; `name` is that of the object in the
    row, such as `messages[]`, and empty for the row itself.
    """

    def __init__(self, content: Mapping[str, Any], where: str, name: str = "") -> None:
        self.where, self._content = where, content
        self._prefix = f"{name}." if name else ""
        self._asked: set[str] = set()
        self._inner: list[str] = []

    def __contains__(self, field: str) -> bool:
        return field in self._content

    def get(self, field: str) -> Any:
        """The field's value, or None."""
        self._asked.add(field)
        return self._content.get(field)

    def optional(self, field: str) -> Any:
        """The field's value; an empty one is absent, for a CSV file has no other absent one."""
        value = self.get(field)
        return None if value in ("", [], {}) else value

    def text(self, field: str) -> str:
        """The text in a field. Errors: `DataError` where it is absent or no text."""
        if field not in self._content:
            raise self.missing(field)
        return text(self.get(field), f'{self.where}: "{field}"')

    def value(self, field: str, *, as_written: bool = False) -> Any:
        """An optional value that may be written as JSON text, as tables have it.

        Null fields in such a text are absent too, unless it is to be read `as_written`.
        """
        value = self.optional(field)
        if not isinstance(value, str):
            return value
        try:
            found = loads(value) if value.strip() else None
            return found if as_written else present(found)
        except ValueError as error:
            raise DataError(
                f'{self.where}: "{field}" is text that is not JSON: {error}',
                "write it as JSON, not as Python prints it",
            ) from error

    def first(self, fields: Iterable[str]) -> str | None:
        """The one of several spellings of a field that is there; two are a `DataError`."""
        found = [field for field in fields if self._content.get(field) not in (None, "", [], {})]
        for field in found:
            self._asked.add(field)
        values = [self._content[field] for field in found]
        if any(value != values[0] for value in values):
            raise DataError(
                f'{self.where}: "{found[0]}" and "{found[1]}" differ', "keep one of the two"
            )
        return found[0] if found else None

    def inside(self, other: Fields) -> None:
        """Count the unused fields of an object in this one as this one's."""
        self._inner += [self._prefix + name for name in other.unused()]

    def unused(self) -> Iterator[str]:
        """The names of fields that have a value and that nobody asked for, each once."""
        own = (
            self._prefix + field
            for field, value in self._content.items()
            if field not in self._asked and value not in ("", [], {})
        )
        return iter(dict.fromkeys([*own, *self._inner]))

    def missing(self, field: str) -> DataError:
        """The error for a field that is not there."""
        guess = closest(field, self._content)
        hint = f', did you mean "{field}" by "{guess}"?' if guess else ""
        return DataError(
            f'{self.where}: no field "{field}" (there is {listed(self._content) or "none"}){hint}',
            f'write "{field}" there' if self._prefix else f'give every row "{field}"',
        )


def text(value: Any, what: str) -> str:
    """`value` where it is text that can be written, else `DataError` that begins with `what`."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind(value)}, not text", "give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half a surrogate pair (\\u{ord(value[error.start]):04x})",
            "write the whole character",
        ) from error
    return value


def closest(field: str, names: Iterable[str]) -> str:
    """The name that looks like a misspelling of `field`, or nothing."""
    candidates = [name for name in names if name not in SHAPE_FIELDS]
    return next(iter(difflib.get_close_matches(field, candidates, 1, 0.75)), "")


def kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def listed(names: Iterable[str]) -> str:
    """The first few names of fields, for an error."""
    return ", ".join(f'"{str(name)[:40]}"' for name in itertools.islice(names, 8))


TOOLS = ("tools", "functions")


def tools_of(row: Fields) -> list[Any]:
    """The descriptions of a row's tools, each `{"type": "function", "function": {...}}`."""
    field = row.first(TOOLS)
    tools = row.value(field) if field else None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise DataError(f'{row.where}: "{field}" is {kind(tools)}', "give a list of objects")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f'{row.where}: "{field}" holds what is no object', "give a list of objects")
    _check_plain(tools, f'{row.where}: "{field}"')
    return [_tool(tool) for tool in tools]


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool that is told flat, with or without its type, as templates expect it."""
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    described = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": described}


def calls_of(turn: Fields, role: str) -> list[dict[str, Any]]:
    """The calls of an assistant's turn in `tool_calls` or, as OpenAI had it, `function_call`."""
    found: list[Any] = []
    for field in ("tool_calls", "function_call"):
        value = turn.value(field)
        if value is None:
            continue
        if role != "assistant":
            raise DataError(
                f'{turn.where}: "{field}" of a {role} turn', "only the assistant calls tools"
            )
        calls = [value] if isinstance(value, Mapping) else value
        if not isinstance(calls, list):
            raise DataError(f'{turn.where}: "{field}" is {kind(value)}', "give a list of objects")
        found += [
            _call(call, f"{turn.where}: {field}[{number}]", turn)
            for number, call in enumerate(calls)
        ]
    return found


def calls_in_text(turn: Fields, field: str) -> list[dict[str, Any]]:
    """The calls that a turn's whole text is."""
    what = f'{turn.where}: "{field}"'
    remedy = 'write {"name": ..., "arguments": {...}}, or a list of such objects'
    try:
        calls = loads(turn.text(field))  # no table fills in what is null in a text
    except ValueError as error:
        raise DataError(f"{what} is a call that is not JSON: {error}", remedy) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError(f"{what} has no call", remedy)
    return [_call(call, what, turn) for call in calls]


def _call(call: Any, where: str, turn: Fields) -> dict[str, Any]:
    """One call with its arguments as an object."""
    if not isinstance(call, Mapping):
        raise DataError(f"{where} is {kind(call)}, not an object", "give name and arguments")
    outer = Fields(call, where, "tool_calls[]")
    inner = outer
    if isinstance(function := outer.get("function"), Mapping):
        inner = Fields(function, where, "tool_calls[].function")
    field = inner.first(("arguments", "parameters"))
    # A null in a text is the call's own: "due": null clears what no "due" leaves alone.
    arguments = inner.value(field, as_written=True) if field else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f'{where}: "{field}" is {kind(arguments)}, not an object', "give an object")
    _check_plain(arguments, f'{where}: "{field}"')
    made: dict[str, Any] = {
        name: outer.get(name) for name in ("id", "index") if outer.optional(name) is not None
    }
    made["type"] = outer.optional("type") or "function"
    made["function"] = {"name": inner.text("name"), "arguments": dict(arguments)}
    if inner is not outer:
        outer.inside(inner)
    turn.inside(outer)
    return made


def _check_plain(value: Any, what: str) -> None:
    """Errors: `DataError` for what JSON, and so a template, cannot write."""
    if not is_plain(value):
        raise DataError(
            f"{what} holds bytes, dates or numbers that JSON has not", "write them as text"
        )
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half a surrogate pair", "write the whole character") from error

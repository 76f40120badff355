"""The tools of a chat and the calls of them, in every spelling that files have, made alike.

A call is `{"type": "function", "function": {"name", "arguments"}}` with an object for arguments,
and so is a tool: what templates expect, and files often shorten or keep as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_kit.data.fields import Fields, kind
from qlora_kit.data.json_text import is_plain, loads
from qlora_kit.errors import DataError

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

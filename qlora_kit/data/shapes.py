"""A record to rows in one of three normal shapes, checked field by field.

Recognised are `text`, `prompt` (`prompt`, `completion`), `instruction` (Alpaca; nested `instances`
give one row each) and `messages` (also ShareGPT's `conversations`). What leaves here is one of
`{"text"} | {"prompt", "completion"} | {"messages": [{"role", "content", ...}], "tools"}`. A message
may carry `weight` 0 or 1 (an assistant turn of weight 0 is read, not learnt), `tool_calls`,
`reasoning_content`, `name` and `tool_call_id`, all of which go to the chat template.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_kit.data.records import kind
from qlora_kit.errors import ConfigError, DataError

SHAPES = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The fields that a row of each shape must have; the first shape that fits is taken."""

OTHER_FIELDS = ("conversations", "instances", "input", "tools")
SHARE_GPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
ROLES = ("system", "user", "assistant", "tool")


def recognise(content: Mapping[str, Any], where: str) -> str:
    """The name of the shape (`--format`) that a row's fields have, else `DataError`."""
    if "conversations" in content:
        return "messages"
    if "instruction" in content and "instances" in content:
        return "instruction"
    for shape, fields in SHAPES.items():
        if all(field in content for field in fields):
            return shape
    # Name the field that is missing from the shape that was most likely meant.
    for field in itertools.chain.from_iterable(SHAPES.values()):
        if _closest(field, content):
            raise _missing(field, content, where)
    for fields in SHAPES.values():
        if any(field in content for field in fields):
            raise _missing(next(f for f in fields if f not in content), content, where)
    wanted = "; ".join(" + ".join(fields) for fields in SHAPES.values())
    raise DataError(
        f"{where}: the fields are {_listed(content) or 'none'}, which is no known shape",
        f"map them with --columns NAME=FIELD to one of: {wanted}",
    )


def parse_columns(columns: str | None) -> dict[str, str]:
    """`question=prompt,answer=completion` as {name in the file: our field}."""
    fields = {*itertools.chain.from_iterable(SHAPES.values()), *OTHER_FIELDS}
    mapping: dict[str, str] = {}
    for part in (columns or "").split(",") if columns else ():
        name, equals, field = part.rpartition("=")
        name, field = name.strip(), field.strip()
        if not (name and equals and field in fields):
            raise ConfigError(
                f"--columns {columns}: {part!r} is not NAME=FIELD",
                f"a field is one of {', '.join(sorted(fields))}",
            )
        if name in mapping or field in mapping.values():
            raise ConfigError(
                f"--columns {columns}: {name}={field} stands beside another {name} or {field}",
                "give every name and every field once",
            )
        mapping[name] = field
    return mapping


def rename(content: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record under our names; a mapped column hides one that has the field's own name."""
    for name in columns:
        if name not in content:
            near = difflib.get_close_matches(name, content, 1)
            hint = f', did you mean "{near[0]}"?' if near else ""
            raise DataError(
                f'{where}: no column "{name[:40]}" (the row has {_listed(content)}){hint}',
                "correct --columns",
            )
    taken = set(columns.values())
    return {
        columns.get(name, name): value
        for name, value in content.items()
        if name in columns or name not in taken
    }


def normalise(content: Mapping[str, Any], format: str, where: str) -> list[dict[str, Any]]:
    """The rows of a record in their normal shape; `format` is a name of `SHAPES`."""
    if format == "messages":
        return [_chat(content, where)]
    if format == "instruction":
        return _instructions(content, where)
    row: dict[str, Any] = {field: text(content, field, where) for field in SHAPES[format]}
    if format == "text" and content.get("goes_on") is True:
        row["goes_on"] = True
    return [row]


def text(content: Mapping[str, Any], field: str, where: str) -> str:
    """The text in a field, else `DataError`."""
    if field not in content:
        raise _missing(field, content, where)
    value = content[field]
    if not isinstance(value, str):
        raise DataError(f'{where}: "{field}" is {kind(value)}, not text', "give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "{field}" has half a surrogate pair (\\u{ord(value[error.start]):04x})',
            "write the whole character",
        ) from error
    return value


def _instructions(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Alpaca's prompt and answer; nested instances share the instruction."""
    instruction = text(content, "instruction", where)
    cases: Any = content.get("instances", [content])
    if not isinstance(cases, list) or not cases:
        found = "empty" if cases == [] else kind(cases)
        raise DataError(f'{where}: "instances" is {found}', "give a list of input and output")
    rows = []
    for number, case in enumerate(cases):
        here = f"{where}: instances[{number}]" if "instances" in content else where
        if not isinstance(case, Mapping):
            raise DataError(f"{here} is {kind(case)}, not an object", "give input and output")
        prompt = f"### Instruction:\n{instruction}\n\n"
        if case.get("input") is not None and (extra := text(case, "input", here)):
            prompt += f"### Input:\n{extra}\n\n"
        rows.append(
            {"prompt": prompt + "### Response:\n", "completion": text(case, "output", here)}
        )
    return rows


def _chat(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The turns: perhaps a system message, then a user's, then any order of the others."""
    share_gpt = "conversations" in content and "messages" not in content
    field = "conversations" if share_gpt else "messages"
    if field not in content:
        raise _missing(field, content, where)
    turns = content[field]
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns == [] else kind(turns)
        raise DataError(f'{where}: "{field}" is {found}', "give a list of messages")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        here = f"{where}: {field}[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{here} is {kind(turn)}, not an object", "give role and content")
        role = _role(turn, "from" if share_gpt else "role", here, share_gpt)
        before = {message["role"] for message in messages}
        if role == "system" and number:
            raise DataError(
                f"{here}: a system message that is not the first", "put one at the start at most"
            )
        if role == "assistant" and "user" not in before:
            raise DataError(
                f"{here}: an assistant turn before any user turn", "start with the user's message"
            )
        if role == "tool" and "assistant" not in before:
            raise DataError(
                f"{here}: a tool's answer before any assistant turn", "start with the user's turn"
            )
        messages.append(_message(turn, role, "value" if share_gpt else "content", here))
    tools = _tools(content.get("tools"), where)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _role(turn: Mapping[str, Any], field: str, where: str, share_gpt: bool) -> str:
    role = text(turn, field, where)
    if share_gpt:
        role = SHARE_GPT_ROLES.get(role, role)
    if role not in ROLES:
        names = (*ROLES, *SHARE_GPT_ROLES) if share_gpt else ROLES
        near = difflib.get_close_matches(role.lower(), names, 1)
        hint = f', did you mean "{near[0]}"?' if near else ""
        raise DataError(f'{where}: unknown role "{role[:40]}"{hint}', f"use {', '.join(names)}")
    return role


def _message(turn: Mapping[str, Any], role: str, field: str, where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role}
    calls = turn.get("tool_calls")
    if turn.get("function_call") is not None:
        raise DataError(f'{where}: "function_call" is not supported', "write it as tool_calls")
    if calls and role != "assistant":
        raise DataError(f'{where}: "tool_calls" of a {role} turn', "only the assistant calls tools")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    ):
        raise DataError(f'{where}: "tool_calls" is {kind(calls)}', "give a list of objects")
    # A turn that only calls a tool has no text; templates tell a missing one from an empty one.
    if not (calls and turn.get(field) is None):
        message["content"] = text(turn, field, where)
    if calls:
        message["tool_calls"] = calls
    for extra in ("name", "tool_call_id", "reasoning_content"):
        if turn.get(extra) is not None:
            message[extra] = text(turn, extra, where)
    weight = turn.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f'{where}: "weight" is {weight!r:.40}', "give 0 or 1")
        if weight and role != "assistant":
            raise DataError(
                f'{where}: "weight" 1 of a {role} turn',
                "only assistant turns are trained on (or all of a row: --train_on_prompt)",
            )
        message["weight"] = int(weight)
    return message


def _tools(tools: Any, where: str) -> list[Any]:
    """The tools' descriptions; tables keep them as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise DataError(f'{where}: "tools" is not JSON: {error}', "give a list") from error
    if not (tools is None or isinstance(tools, list)):
        raise DataError(f'{where}: "tools" is {kind(tools)}', "give a list of objects")
    if not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise DataError(f'{where}: "tools" holds what is no object', "give a list of objects")
    return tools or []


def _missing(field: str, content: Mapping[str, Any], where: str) -> DataError:
    guess = _closest(field, content)
    hint = f', did you mean "{field}" by "{guess}"?' if guess else ""
    return DataError(
        f'{where}: no field "{field}" (the row has {_listed(content) or "none"}){hint}',
        f'give every row "{field}", or map another name with --columns NAME={field}',
    )


def _closest(field: str, content: Iterable[str]) -> str:
    """The field of the row that looks like a misspelling of `field`."""
    # A field of the shapes is no misspelling: "output" is not one of "input".
    known = {name for fields in SHAPES.values() for name in fields}
    candidates = [name for name in content if name not in known]
    return next(iter(difflib.get_close_matches(field, candidates, 1, 0.75)), "")


def _listed(content: Iterable[str]) -> str:
    return ", ".join(f'"{str(name)[:40]}"' for name in itertools.islice(content, 8))

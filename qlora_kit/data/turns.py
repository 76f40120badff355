"""The turns of a chat in every spelling that files have, made the one that templates read.

A message that leaves here has `role` and, where they are there, `content`, `tool_calls`, thoughts
under the name that the file has for them, `name`, `tool_call_id` and `weight`, which is 0 or 1 (an
assistant's turn of weight 0 is read, not learnt). Calls and tools are made alike in
`fields.py`.

Sources: OpenAI's chat files, ShareGPT's and LLaMA-Factory's, TRL's and axolotl's documentation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_kit.data.fields import Fields, calls_in_text, calls_of, kind, text, tools_of
from qlora_kit.errors import DataError

SYSTEM = ("system", "system_prompt")
"""Fields of a row that have its system text."""
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")
"""Roles whose text is a call, or an array of calls, as JSON."""

WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight")
"""Fields of a turn that say whether it is trained on."""

REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "reasoning"}
"""Kinds of the parts of a content, and the field that holds the text of each."""


def messages_of(row: Fields, field: str) -> list[dict[str, Any]]:
    """The messages in a field of a row. Errors: `DataError` with the place."""
    turns = row.value(field)
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns is None and field in row else kind(turns)
        raise DataError(f'{row.where}: "{field}" is {found}', "give a list of messages")
    messages = []
    for number, turn in enumerate(turns):
        here = f"{row.where}: {field}[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{here} is {kind(turn)}, not an object", "give role and content")
        fields = Fields(turn, here, f"{field}[]")
        messages.append(_message(fields, share_gpt=field == "conversations"))
        # Some files keep the tools in the system message.
        if not number and (tools := tools_of(fields)):
            messages[0]["tools"] = tools
        row.inside(fields)
    return messages


def check_order(messages: list[dict[str, Any]], where: str) -> None:
    """Perhaps one system message, then a user's, then any order of the others, else `DataError`."""
    before: set[str] = set()
    for number, message in enumerate(messages):
        here, role = f"{where}[{number}]", message["role"]
        if role in ("system", "developer") and number:
            raise DataError(
                f"{here}: a {role} message that is not the first", "put one at the start at most"
            )
        if role == "assistant" and "user" not in before:
            raise DataError(
                f"{here}: an assistant turn before any user turn", "start with the user's message"
            )
        if role == "tool" and "assistant" not in before:
            raise DataError(
                f"{here}: a tool's answer before any assistant turn", "start with the user's turn"
            )
        before.add(role)


def with_system_and_tools(
    row: Fields, messages: list[dict[str, Any]], field: str
) -> dict[str, Any]:
    """A chat with the system text and the tools of its row. Errors: `DataError`."""
    tools, own = tools_of(row), messages[0].pop("tools", [])
    if tools and own and tools != own:
        raise DataError(
            f"{row.where}: the row's tools and those of its first message differ",
            "keep one of the two",
        )
    system = system_of(row)
    if system is not None:
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0].get("content") != system:
            raise DataError(
                f"{row.where}: a system text stands beside another {messages[0]['role']} message",
                "keep one of the two",
            )
    check_order(messages, f"{row.where}: {field}")
    return {"messages": messages, **({"tools": tools or own} if tools or own else {})}


def system_of(row: Fields) -> str | None:
    """A row's own system text."""
    field = row.first(SYSTEM)
    return None if field is None else row.text(field)


def for_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message under the names that a chat template reads.

    A template that does not know the role `developer` gets a system message, which is what it
    stands for, and thoughts have the name that the template has for them.
    """
    shown = {name: value for name, value in message.items() if name != "weight"}
    if shown["role"] == "developer" and "developer" not in template:
        shown["role"] = "system"
    spelled = next((name for name in REASONING if name in shown), None)
    if spelled is not None:
        thoughts = shown.pop(spelled)
        shown.update({name: thoughts for name in REASONING if _reads(template, name)})
    return shown


def left_out(messages: Iterable[Mapping[str, Any]], tools: Any, template: str) -> str:
    """The parts of a chat that a template does not read by name, so that it cannot write them."""
    used = dict.fromkeys(name for message in messages for name in message)
    parts = [name for name in ("tool_calls", *REASONING) if name in used]
    read = {"tool_calls": "tool_calls" in template}
    read |= dict.fromkeys(REASONING, any(_reads(template, name) for name in REASONING))
    missing = ["tools"] if tools and "tools" not in template else []
    return ", ".join([*missing, *(part for part in parts if not read[part])])


def unread(messages: Iterable[Mapping[str, Any]], template: str) -> list[str]:
    """Fields that a chat has beside its texts and that the template does not write.

    A model does not need them to answer, so that their loss is named and no reason to skip a row.
    """
    names = []
    for name in ("name", "tool_call_id"):
        if any(name in message for message in messages) and not _reads(template, name):
            names.append(f"messages[].{name}")
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    if any("id" in call for call in calls) and not _reads(template, "id"):
        names.append("messages[].tool_calls[].id")
    return names


def _reads(template: str, field: str) -> bool:
    """Whether a template asks a message for a field: `m.field` or `m['field']`."""
    return re.search(rf"""\.{field}\b|['"]{field}['"]""", template) is not None


def _message(turn: Fields, share_gpt: bool) -> dict[str, Any]:
    role_field = "from" if "role" not in turn and (share_gpt or "from" in turn) else "role"
    field = "value" if "content" not in turn and (share_gpt or "value" in turn) else "content"
    named = turn.text(role_field)
    role = OTHER_ROLES.get(named, named)
    if role not in ROLES:
        names = (*ROLES, *OTHER_ROLES)
        near = difflib.get_close_matches(named.lower(), names, 1)
        hint = f', did you mean "{near[0]}"?' if near else ""
        raise DataError(
            f'{turn.where}: unknown role "{named[:40]}"{hint}', f"use {', '.join(names)}"
        )
    message: dict[str, Any] = {"role": role}
    calls = calls_of(turn, role)
    thoughts: list[str] = []
    if named in CALLS:
        calls = [*calls, *calls_in_text(turn, field)]
    # A turn that only calls a tool has no text; templates tell a missing one from an empty one.
    elif not calls or field in turn:
        message["content"] = _content(turn, field, thoughts)
    if calls:
        message["tool_calls"] = calls
    spelled = turn.first(REASONING)
    if spelled:
        thoughts.append(turn.text(spelled))
    if thoughts:
        message[spelled or REASONING[0]] = "\n".join(thoughts)
    for extra in ("name", "tool_call_id"):
        if turn.optional(extra) is not None:
            message[extra] = turn.text(extra)
    weight = _weight(turn, role)
    if weight is not None:
        message["weight"] = weight
    return message


def _content(turn: Fields, field: str, thoughts: list[str]) -> str:
    """A turn's text; of a list of parts the texts one after the other, as templates write them."""
    parts = turn.get(field)
    if not isinstance(parts, list):
        return turn.text(field)
    texts = []
    for number, part in enumerate(parts):
        here = f"{turn.where}.{field}[{number}]"
        if isinstance(part, str):
            texts.append(text(part, here))
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"{here} is {kind(part)}, not an object", "give type and text")
        fields = Fields(part, here, f"{field}[]")
        name = fields.text("type")
        if name not in TEXT_PARTS and name not in THOUGHT_PARTS:
            raise DataError(
                f'{here} is of type "{name[:40]}", and only texts are trained on',
                "take the part, or the row, out of the file",
            )
        found = fields.text(TEXT_PARTS.get(name) or THOUGHT_PARTS[name])
        (texts if name in TEXT_PARTS else thoughts).append(found)
        turn.inside(fields)
    return "".join(texts)


def _weight(turn: Fields, role: str) -> int | None:
    """Whether the turn is trained on, in whichever field says so; None where none does."""
    found: dict[str, int] = {}
    for field in WEIGHTS:
        value = turn.get(field)
        if value is None or value == "":
            continue
        if value not in (0, 1):
            raise DataError(
                f'{turn.where}: "{field}" is {value!r:.40}', "give 0 or 1, or false or true"
            )
        if value and role != "assistant":
            raise DataError(
                f'{turn.where}: "{field}" {value!r} of a {role} turn',
                f'take "{field}" out of it: only assistant turns are trained on',
            )
        found[field] = int(value)
    if len(set(found.values())) > 1:
        names = " and ".join(f'"{name}" {value}' for name, value in found.items())
        raise DataError(f"{turn.where}: {names} contradict each other", "keep one of them")
    return next(iter(found.values()), None)

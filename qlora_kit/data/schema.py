"""A record to rows in one of four normal shapes, checked field by field.

Recognised are `text`, `prompt` (`prompt`, `completion`, each text or a list of messages),
`instruction` (Alpaca, with `system` and `history`; nested `instances` give one row each),
`messages` (also ShareGPT's `conversations`) and `preference` (`pairs.py`). What leaves here is one
of `{"text"} | {"prompt", "completion"} | {"messages": [{"role", "content", ...}], "tools"}`, or
`{"chosen", "rejected"}` with two of these; whether control tokens in it are text; and the names of
fields that nothing reads.

Left out: the turns of a chat (`turns.py`).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.fields import SHAPE_FIELDS, TOOLS, Fields, closest, kind, listed, text
from qlora_kit.data.pairs import pair_of
from qlora_kit.data.turns import SYSTEM, messages_of, system_of, with_system_and_tools
from qlora_kit.errors import ConfigError, DataError

SHAPES = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
"""The fields that a row of each shape must have; the first shape that fits is taken."""

OTHER_FIELDS = ("conversations", "instances", "input", "history", *SYSTEM, *TOOLS)


@dataclass(frozen=True)
class Normal:
    """A row in its normal shape."""

    content: dict[str, Any]
    literal: bool = False
    unused: tuple[str, ...] = ()


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
    for field in SHAPE_FIELDS:
        if closest(field, content):
            raise _unmapped(field, content, where)
    for fields in SHAPES.values():
        if any(field in content for field in fields):
            raise _unmapped(next(f for f in fields if f not in content), content, where)
    wanted = "; ".join(" + ".join(fields) for fields in SHAPES.values())
    raise DataError(
        f"{where}: the fields are {listed(content) or 'none'}, which is no known shape",
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


def rename(
    content: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """The record under our names; a mapped column hides one that has the field's own name.

    Also the names of what is hidden.
    """
    for name in columns:
        if name not in content:
            near = difflib.get_close_matches(name, content, 1)
            hint = f', did you mean "{near[0]}"?' if near else ""
            raise DataError(
                f'{where}: no column "{name[:40]}" (the row has {listed(content)}){hint}',
                "correct --columns",
            )
    hidden = [name for name in content if name not in columns and name in columns.values()]
    renamed = {
        columns.get(name, name): value for name, value in content.items() if name not in hidden
    }
    return renamed, hidden


def normalise(
    content: Mapping[str, Any],
    format: str,
    where: str,
    as_chat: bool = False,
    document: bool = False,
) -> list[Normal]:
    """The rows of a record in their normal shape; `format` is a name of `SHAPES`.

    `as_chat` makes chats of Alpaca's rows. A `document` is plain text in blocks, whose `goes_on`
    is ours.
    """
    row = Fields(content, where)
    if format == "instruction":
        return list(_instructions(row, as_chat))
    if format == "messages":
        made = _chat(row)
    elif format == "preference":
        made = pair_of(row)
    elif format == "text":
        made = {"text": row.text("text")}
        if document and row.get("goes_on") is True:
            made["goes_on"] = True
    elif isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        made = _chat_of_two(row)
    else:
        made = {field: row.text(field) for field in SHAPES["prompt"]}
    return [Normal(made, False, tuple(row.unused()))]


def _instructions(row: Fields, as_chat: bool) -> Iterator[Normal]:
    """Alpaca's prompt and answer, or the same as a chat; nested instances share the instruction."""
    instruction = row.text("instruction")
    system = system_of(row) or ""
    history = list(_history(row))
    if "instances" not in row:
        cases = [row]
    else:
        found = row.get("instances")
        if not isinstance(found, list) or not found:
            what = "empty" if found == [] else kind(found)
            raise DataError(
                f'{row.where}: "instances" is {what}', "give a list of input and output"
            )
        cases = []
        for number, case in enumerate(found):
            here = f"{row.where}: instances[{number}]"
            if not isinstance(case, Mapping):
                raise DataError(f"{here} is {kind(case)}, not an object", "give input and output")
            cases.append(Fields(case, here, "instances[]"))
    made = []
    for case in cases:
        extra = case.text("input") if case.optional("input") is not None else ""
        made.append((system, history, instruction, extra, case.text("output")))
        if case is not row:
            row.inside(case)
    unused = tuple(row.unused())
    for parts in made:
        yield Normal(_as_chat(*parts) if as_chat else _as_pair(*parts), not as_chat, unused)


def _history(row: Fields) -> Iterator[tuple[str, str]]:
    """The earlier turns of an Alpaca row: `[[question, answer], ...]`."""
    history = row.value("history") or []
    remedy = "give a list of [question, answer]"
    if not isinstance(history, list):
        raise DataError(f'{row.where}: "history" is {kind(history)}', remedy)
    for number, turn in enumerate(history):
        here = f"{row.where}: history[{number}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{here} is {kind(turn)}, not two texts", remedy)
        yield text(turn[0], f"{here}[0]"), text(turn[1], f"{here}[1]")


def _as_pair(
    system: str, history: list[tuple[str, str]], instruction: str, extra: str, output: str
) -> dict[str, Any]:
    """Alpaca's own form; of earlier turns nothing is trained on."""
    parts = [system] if system else []
    for question, answer in history:
        parts += [f"### Instruction:\n{question}", f"### Response:\n{answer}"]
    parts.append(f"### Instruction:\n{instruction}")
    if extra:
        parts.append(f"### Input:\n{extra}")
    parts.append("### Response:\n")
    return {"prompt": "\n\n".join(parts), "completion": output}


def _as_chat(
    system: str, history: list[tuple[str, str]], instruction: str, extra: str, output: str
) -> dict[str, Any]:
    """The same for the model's chat template; earlier answers are turns like the last one."""
    turns = [("system", system)] if system else []
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", f"{instruction}\n{extra}" if extra else instruction))
    turns.append(("assistant", output))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _chat(row: Fields) -> dict[str, Any]:
    """A row of messages, its system text and its tools."""
    field = "messages" if "messages" in row else "conversations"
    if field not in row:
        raise row.missing("messages")
    messages = messages_of(row, field)
    return with_system_and_tools(row, messages, field)


def _chat_of_two(row: Fields) -> dict[str, Any]:
    """A prompt and a completion that are messages: only what answers the prompt is trained on."""
    parts = []
    for field in SHAPES["prompt"]:
        if field in row and not isinstance(row.get(field), list):
            raise DataError(
                f'{row.where}: "{field}" is {kind(row.get(field))}, and the other is a list of '
                "messages",
                "write both as text, or both as lists of messages",
            )
        if field not in row:
            raise row.missing(field)
        parts.append(messages_of(row, field))
    prompt, completion = parts
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0
    return with_system_and_tools(row, [*prompt, *completion], "messages")


def _unmapped(field: str, content: Mapping[str, Any], where: str) -> DataError:
    """The error for a first row without a field of the shape that seems to be meant."""
    error = Fields(content, where).missing(field)
    if guess := closest(field, content):
        return DataError(error.problem, f"correct it, or give --columns {guess}={field}")
    others = set(content) - {*SHAPE_FIELDS, *OTHER_FIELDS}
    if others:
        return DataError(
            error.problem,
            f'give every row "{field}", or --columns NAME={field} with one of the names it has',
        )
    return error

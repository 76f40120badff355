"""Pairs of answers to one prompt, of which one is preferred: rows of `prompt, chosen, rejected`.

The two may be texts behind a prompt that is text, or lists of messages behind a prompt of messages.
Whole chats need no `prompt`: the messages that both begin with are it.

Left out: their tokens (`encode.py`).
"""

from __future__ import annotations

from typing import Any

from qlora_kit.data.fields import Fields, kind
from qlora_kit.data.turns import messages_of, with_system_and_tools
from qlora_kit.errors import DataError

SIDES = ("chosen", "rejected")


def pair_of(row: Fields) -> dict[str, Any]:
    """A row's two answers in a normal shape each, their prompt in both. Errors: `DataError`."""
    for side in SIDES:
        if side not in row:
            raise row.missing(side)
    are_chats = [isinstance(row.get(side), list) for side in SIDES]
    if are_chats[0] != are_chats[1]:
        text, chat = SIDES if are_chats[1] else SIDES[::-1]
        raise DataError(
            f'{row.where}: "{text}" is {kind(row.get(text))}, and "{chat}" is a list of messages',
            "write both as text, or both as lists of messages",
        )
    if all(are_chats):
        return _chats(row)
    if isinstance(row.get("prompt"), list):
        raise DataError(
            f'{row.where}: "prompt" is a list of messages, and "chosen" and "rejected" are texts',
            "write all three as text, or all as lists of messages",
        )
    prompt = row.text("prompt")
    return {side: {"prompt": prompt, "completion": row.text(side)} for side in SIDES}


def _chats(row: Fields) -> dict[str, Any]:
    answers = {side: messages_of(row, side) for side in SIDES}
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        first = messages_of(row, "prompt")
    else:
        first = _shared(*answers.values())
        if not first:
            raise DataError(
                f'{row.where}: "chosen" and "rejected" do not begin with the same message',
                'give every row a "prompt", or chats that share their first messages',
            )
        if isinstance(prompt, str) and prompt not in [one.get("content") for one in first]:
            raise DataError(
                f'{row.where}: "prompt" is none of the messages that "chosen" and "rejected" share',
                "leave it out, or write it as a list of messages",
            )
        answers = {side: answer[len(first) :] for side, answer in answers.items()}
    # What was said before is read, not learnt.
    before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in first]
    return {
        side: with_system_and_tools(row, [*map(dict, before), *answer], side)
        | {"answer_messages": len(answer)}
        for side, answer in answers.items()
    }


def _shared(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that two chats begin with; of equal chats all but the last."""
    count = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        count += 1
    return chosen[:count]


def is_pair(content: dict[str, Any]) -> bool:
    """Whether a row's content is a pair."""
    return "chosen" in content

"""What generation takes from a chat template: the ids of a prompt, and where an answer ends.

Messages of which the template would leave a part out are refused, as training skips such rows.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_kit.data.chat_mask import chat_tokens, chats
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions
from qlora_kit.data.rendering import (
    SYSTEM,
    Messages,
    Renderer,
    Rendering,
    header_text,
    is_written,
    unwritten_texts,
)
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Tokens, decoded
from qlora_kit.data.turn_spans import behind_prompt
from qlora_kit.data.turns import left_out, unread
from qlora_kit.errors import DataError, QloraKitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ANSWERS = ("A", "Yes, 1.")
"""What assistants say where only the beginning or the end of their turn matters."""


def chat_ids(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions = NO_OPTIONS,
    limit: int | None = None,
) -> list[int]:
    """The ids that training puts before the answer to some messages.

    They are those of an answer that is trained on: some tokenizers read the end of a prompt
    differently where something follows, and a token that reaches into the answer belongs to it.
    Of more ids than `limit` the first ones are given, and perhaps not all.
    Errors: those of the template and the tokenizer, `DataError`.
    """
    tokens = Tokens(tokenizer)
    header = header_text(messages, tokens, options)
    text, literals = header.text, header.literals
    answer = {"role": "assistant", "content": ANSWERS[0]}
    whole = _answered(Renderer(tokens, "prompt", options), [*messages, answer], text)
    # Where the template writes the turn otherwise, the prompt alone says what comes before it.
    if whole is not None:
        text, literals = whole.text, whole.literals
    encoded = chat_tokens(tokens, text, literals, limit)
    if encoded is None:
        raise DataError(
            "prompt: a control token that cannot be taken apart", "leave the control token out"
        )
    border = len(header.text)
    ids = [token for token, (_, last) in zip(*encoded, strict=True) if last <= border]
    if limit is not None and len(ids) > limit:
        return ids
    return tokens.one_start(ids, [False] * len(ids))[0]


def _answered(template: Renderer, messages: Messages, header: str) -> Rendering | None:
    """Some messages, the last one an answer, as training writes them; None unless behind `header`.

    A few renderings, however many turns there are: what is before the answer is read only.
    """
    try:
        shown = template.adapted(messages)
        whole = template.render(shown)
        if not whole.text.startswith(header):
            met = behind_prompt(template, shown)
            whole = whole if met is None else met[0]
    except QloraKitError:
        return None
    return whole if whole.text.startswith(header) else None


def turn_ends(
    tokenizer: PreTrainedTokenizerBase, options: ChatOptions = NO_OPTIONS
) -> frozenset[int]:
    """The tokens with which the chat template ends an assistant's turn, whatever the turn says.

    They are the last trained tokens of turns of every kind: alone, before others, with a call.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return frozenset()
    tokens, ends = Tokens(tokenizer), set[int]()
    for system, kind in itertools.product((False, True), ("alone", "before others", "calls")):
        # What stands at the end of two turns that end differently is the template's.
        first, other = (_end(_probe(text, kind, system), tokens, options) for text in ANSWERS)
        if first is not None and first == other:
            ends.add(first)
    return frozenset(ends)


def _probe(answer: str, kind: str, system: bool) -> Row:
    """A chat with one trained turn."""
    turn: dict[str, Any] = {"role": "assistant", "content": answer}
    user = {"role": "user", "content": "Hi"}
    content: dict[str, Any] = {"messages": [user, turn]}
    if kind == "calls":
        called = {"name": answer[:1], "arguments": {"of": answer}}
        # Mistral's templates take ids of nine letters.
        turn["tool_calls"] = [{"id": "a" * 9, "type": "function", "function": called}]
        turn["content"] = ""
        described = {"name": answer[:1], "description": "", "parameters": {}}
        content["tools"] = [{"type": "function", "function": described}]
    if kind == "before others":
        content["messages"] += [user, {**turn, "weight": 0}]
    if system:
        content["messages"].insert(0, {"role": "system", "content": "Be."})
    return Row(content, "the chat template", 1)


def _end(row: Row, tokens: Tokens, options: ChatOptions) -> int | None:
    """The token that ends the last trained turn of a chat; None where there is none.

    Only a control token ends one: answers would stop at the first line end, or at a bracket.
    """
    try:
        found = chats(row, tokens, replace(options, train_on="last"))
    except QloraKitError:
        return None
    if not isinstance(found, list):
        return None
    chat = found[-1]
    encoded = chat_tokens(tokens, chat.text, chat.literals)
    if encoded is None:
        return None
    last = max(turn.span[1] for turn in chat.turns if turn.trained)
    inside = [(token, span) for token, span in zip(*encoded, strict=True) if span[0] < last]
    # A line end of the template's stands behind it, where the template marks that as trained.
    while inside and inside[-1][0] not in tokens.added_ids:
        _, span = inside.pop()
        if chat.text[slice(*span)].strip():
            return None
    return inside[-1][0] if inside else None


def ends_text(tokenizer: Any, chat: ChatOptions) -> str:
    """One line: at which tokens answers stop, and the day that is written."""
    ends = sorted(decoded(tokenizer, [one]) for one in turn_ends(tokenizer, chat))
    said = f"turns end with {', '.join(map(repr, ends))}, where answers stop"
    if not ends:
        said = (
            "turns end with no control token of the chat template: answers stop at EOS only, "
            "which is not learnt"
        )
    return said + (f"; written on {chat.date} (--chat_date)" if chat.date else "")


def unwritten(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, options: ChatOptions = NO_OPTIONS
) -> str:
    """The parts of a chat that its template does not write, in words; empty where there are none.

    Not named are ids of calls and what a tool's answer says of its tool, which clients have to
    send, which every template may leave to the order of the messages; nor thoughts of earlier
    turns, which templates that know thoughts take out.
    Errors: `DataError` and others of the template.
    """
    template = Renderer(Tokens(tokenizer), "prompt", options)
    adapted = template.adapted(messages)
    if parts := left_out(adapted, None, template.text):
        return parts
    spoken = [message for message in messages if message["role"] != "tool"]
    if "messages[].name" in unread(spoken, template.text):
        return "the name of a message"
    text = template.render(adapted, header=True).text
    absent = [at for at, message in enumerate(messages) if not is_written(message, text)]
    if not absent:
        absent = unwritten_texts(template, messages, header=True)
    return ", ".join(
        "the system message"
        if messages[at]["role"] in SYSTEM
        else f"messages[{at}] of the role {messages[at]['role']}"
        for at in absent[:3]
    )

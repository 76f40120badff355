"""A chat to its rendered text, its ids, and which characters are an assistant's turn to write.

The turns are where the template says `{% generation %}`: the union of its marks, as transformers
has it. Else they are found by comparing renderings (`turn_spans.py`). A template that writes a turn
differently once others follow (Qwen 3 takes the thoughts out) gives one chat for each assistant
turn, with the messages up to it, as the model will meet it. What a template leaves out of a message
is noticed.

Source of the ids: transformers' `encode_marked_chat` (5.x).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.rendering import (
    SYSTEM,
    Messages,
    Renderer,
    Rendering,
    is_written,
    unwritten_texts,
)
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Skipped, Span, Tokens, in_use, pieces
from qlora_kit.data.turn_spans import behind_prompt, turn_span, with_end
from qlora_kit.data.turns import left_out
from qlora_kit.errors import DataError, TokenizerError

NO_TURN = "no assistant turn"
LEFT_OUT = "the chat template leaves out a part of a message"
MOST_KINDS = 4096
"""Kinds of chats, by the roles and fields of their messages, that are remembered at a time."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Turn:
    """The characters of one assistant turn, its end token included."""

    span: Span
    trained: bool


@dataclass
class Chat:
    """A rendered chat; in `literals` control tokens are text."""

    text: str
    literals: list[Span]
    turns: list[Turn]


def chats(row: Row, tokens: Tokens, options: ChatOptions) -> list[Chat] | Skipped:
    """The chats to train on for a row: one, or one for each trained assistant turn.

    Errors: `TokenizerError` where the template does not show where a turn begins and ends,
    `DataError` where it refuses the messages.
    """
    template = Renderer(tokens, row.where, options, row.content.get("tools"))
    messages = template.adapted(row.content["messages"])
    assistants = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    trained = [i for i in assistants if messages[i].get("weight", 1)]
    if options.train_on == "last":
        trained = trained[-1:]
    if not trained:
        return Skipped(NO_TURN)
    if parts := left_out(messages, row.content.get("tools"), template.text):
        return Skipped(f"{LEFT_OUT}: {parts}")
    try:
        if not _is_read(template, messages, "tools" in row.content, tokens.read):
            return Skipped(LEFT_OUT)
        if GENERATION.search(template.text):
            found = _chats_by_marks(template, messages, trained)
        else:
            found = _chats_by_renderings(template, messages, assistants, trained)
    except DataError as error:
        if messages[0]["role"] not in SYSTEM or options.merge_system:
            raise
        raise DataError(
            error.problem, "give --merge_system where the template takes no system message"
        ) from error
    return found if found else Skipped(LEFT_OUT)


def _is_read(
    template: Renderer, messages: Messages, tools: bool, known: dict[tuple[Any, ...], bool]
) -> bool:
    """Whether the template writes what assistants answer to; asked once for messages of a kind.

    Some write a system text only where a user's message is the last, which is how a model is asked.
    """
    key = template.text, tools, *((one["role"], *sorted(filter(one.get, one))) for one in messages)
    if key not in known:
        if len(known) == MOST_KINDS:
            known.clear()
        last = max(at for at, one in enumerate(messages) if one["role"] == "assistant")
        absent = set(unwritten_texts(template, messages))
        if absent:
            absent &= set(unwritten_texts(template, messages[:last], header=True))
        known[key] = all(messages[at]["role"] == "assistant" for at in absent)
    return known[key]


def _chats_by_renderings(
    template: Renderer, messages: Messages, assistants: list[int], trained: list[int]
) -> list[Chat]:
    """Chats by comparing renderings; none where the template leaves out a part of a message."""
    whole = template.render(messages)
    turns = []
    for index in assistants:
        span = turn_span(template, messages, index, whole)
        learnt = index in trained
        if span is None or not is_written(messages[index], whole.text[slice(*span)], learnt):
            return _chat_for_each_turn(template, messages, trained)
        whole, span = with_end(template, messages, index, whole, span)
        turns.append(Turn(span, learnt))
    complete = all(is_written(message, whole.text) for message in messages)
    return [Chat(whole.text, whole.literals, turns)] if complete else []


def _chat_for_each_turn(template: Renderer, messages: Messages, trained: list[int]) -> list[Chat]:
    """One chat for each trained turn, for templates that write earlier turns differently."""
    result = []
    for index in trained:
        part = messages[: index + 1]
        whole = template.render(part)
        span = turn_span(template, part, index, whole)
        if span is None or not is_written(part[-1], whole.text[slice(*span)], thoughts=True):
            met = behind_prompt(template, part)
            if met is None and span is not None:
                return []
            whole, span = met or (whole, None)
        if span is None:
            raise TokenizerError(
                f"{template.where}: the chat template's rendering of message {index} does not "
                "begin with its rendering of the messages before, so its place cannot be told",
                "use a template with {% generation %}, or rows of prompt and completion",
            )
        own = whole.text[slice(*span)]
        if not all(is_written(one, whole.text) for one in part) or not is_written(
            part[-1], own, thoughts=True
        ):
            return []
        whole, span = with_end(template, part, index, whole, span)
        result.append(Chat(whole.text, whole.literals, [Turn(span, True)]))
    return result


def _chats_by_marks(template: Renderer, messages: Messages, trained: list[int]) -> list[Chat]:
    """Chats by the template's own marks; none where it leaves out a part of a message.

    One chat, or one for each trained turn where later turns take something of earlier ones away.
    """
    chat, owners = _by_marks(template, messages, trained)
    if not all(is_written(message, chat.text) for message in messages):
        return []
    if all(is_written(messages[i], _marked_text(chat, owners, i), thoughts=True) for i in trained):
        return [chat]
    result = []
    for index in trained:
        part = messages[: index + 1]
        chat, owners = _by_marks(template, part, [index])
        if not is_written(part[-1], _marked_text(chat, owners, index), thoughts=True):
            return []
        result.append(chat)
    return result


def _marked_text(chat: Chat, owners: list[int], index: int) -> str:
    """All that is marked in the turn of message `index`."""
    spans = [turn.span for turn, owner in zip(chat.turns, owners, strict=True) if owner == index]
    # A turn without a mark of its own is not looked at: what is learnt is the union of the marks.
    return chat.text[spans[0][0] : spans[-1][1]] if spans else chat.text


def _by_marks(template: Renderer, messages: Messages, trained: list[int]) -> tuple[Chat, list[int]]:
    """The parts that the template marks, a turn of each, and the messages that they are of."""
    whole = template.render(messages)
    assistants = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    spans = whole.generated
    owners = _owners(template, messages, whole, assistants, trained)
    # Where all is trained on, it is the union of the marks, whatever turn they are in.
    if not spans or (trained != assistants and not set(trained) <= set(owners)):
        raise TokenizerError(
            f"{template.where}: the chat template's {{% generation %}} marks {len(set(owners))} "
            f"of the {len(assistants)} assistant turns",
            "mark every assistant turn in the template, or take the marks out",
        )
    # A model that never sees the end of its turn trained does not learn to stop.
    for number, (first, last) in enumerate(spans):
        following = number + 1 < len(spans)
        if following and owners[number + 1] == owners[number]:
            continue
        rest = whole.text[last : spans[number + 1][0] if following else len(whole.text)]
        is_last = owners[number] == len(messages) - 1
        ends = template.special
        outside = any(s in rest for s in ends) if is_last else rest.startswith(ends)
        if outside and not whole.text[first:last].rstrip().endswith(ends):
            raise TokenizerError(
                f"{template.where}: the chat template's {{% generation %}} leaves out the turn's "
                "end token",
                "put the end token inside {% generation %}, or take the marks out",
            )
    turns = [Turn(span, owner in trained) for span, owner in zip(spans, owners, strict=True)]
    return Chat(whole.text, whole.literals, turns), owners


def _owners(
    template: Renderer,
    messages: Messages,
    whole: Rendering,
    assistants: list[int],
    trained: list[int],
) -> list[int]:
    """The assistant turn that each mark is in, by where the messages before it end."""
    if len(whole.generated) == len(assistants) and trained == assistants:
        return list(assistants)
    begins = [
        len(os.path.commonprefix((whole.text, template.render(messages[:i]).text)))  # noqa: RUF071
        for i in assistants
    ]
    return [
        max(
            (i for i, begin in zip(assistants, begins, strict=True) if begin <= first),
            default=assistants[0],
        )
        for first, _ in whole.generated
    ]


def chat_tokens(
    tokens: Tokens, text: str, literals: Sequence[Span], limit: int | None = None
) -> tuple[list[int], list[Span]] | None:
    """Ids of a rendered chat and the characters of each, no special token added.

    In the spans `literals`, control tokens are plain text; None where the tokenizer cannot
    take one apart. Of more than `limit` ids the first ones are given, and perhaps not all.
    """
    ids: list[int] = []
    spans: list[Span] = []
    done = 0
    for first, last in [*literals, (len(text), len(text))]:
        for piece in pieces(text[done:first]):
            _append(tokens, text, done, done + len(piece), ids, spans)
            done += len(piece)
            if limit is not None and len(ids) > limit:
                return ids, spans
        before = len(ids)
        # Cut behind its first character, a control token is in neither part.
        _append(tokens, text, first, min(first + 1, last), ids, spans)
        _append(tokens, text, min(first + 1, last), last, ids, spans)
        added = set(tokens.tokenizer.convert_ids_to_tokens(ids[before:]))
        if added & tokens.special or text[first:last] in added & tokens.added:
            return None
        done = last
    return ids, spans


def _append(
    tokens: Tokens, text: str, first: int, last: int, ids: list[int], spans: list[Span]
) -> None:
    """Add the tokens of a part of the text as what follows the parts before it."""
    if first == last:
        return
    # Behind a line end, which is taken off again: at the beginning of a text some tokenizers
    # put a space before the first word.
    lead = "\n" if first else ""
    more, places = _with_places(tokens, lead + text[first:last])
    if any(place[0] < len(lead) < place[1] for place in places):
        lead = ""
        more, places = _with_places(tokens, text[first:last])
    kept = [i for i, place in enumerate(places) if not lead or place[1] > len(lead)]
    ids += [more[i] for i in kept]
    shift = first - len(lead)
    spans += [(places[i][0] + shift, places[i][1] + shift) for i in kept]


def _with_places(tokens: Tokens, text: str) -> tuple[list[int], list[Span]]:
    with in_use(tokens.tokenizer):
        encoded = tokens.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])

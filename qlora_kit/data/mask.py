"""A chat to its rendered text, and which characters of it are an assistant's turn to write.

The turns are where the template says `{% generation %}`; else turn i is what the rendering of the
first i + 1 messages has more than that of the first i with the header of an answer. Each of these
must be the beginning of the whole, which is checked. A template that writes a turn differently
once others follow (Qwen 3 takes the thoughts out) gives one chat for each assistant turn, with the
messages up to it, as the model will meet it. Ids are never searched for.

Control tokens in messages are hidden from the template behind numbers, and put back as spans in
which they are plain text. What a template leaves out of a message is noticed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.data.read import Row
from qlora_kit.data.sandbox import CLOSE, LITERAL, OPEN, check_template, render
from qlora_kit.data.tokens import Skipped, Span, Tokens
from qlora_kit.data.turns import for_template, left_out
from qlora_kit.errors import DataError, TokenizerError

NO_TURN = "no assistant turn"
LEFT_OUT = "the chat template leaves out a part of a message"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = re.compile(f"{LITERAL}(\\d+){LITERAL}|{OPEN}|{CLOSE}")


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


@dataclass
class _Rendering:
    text: str
    literals: list[Span] = field(default_factory=list)
    generated: list[Span] = field(default_factory=list)


def chats(row: Row, tokens: Tokens) -> list[Chat] | Skipped:
    """The chats to train on for a row: one, or one for each trained assistant turn.

    Errors: `TokenizerError` where the template does not show where a turn begins and ends,
    `DataError` where it refuses the messages.
    """
    messages = row.content["messages"]
    assistants = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    trained = [i for i in assistants if messages[i].get("weight", 1)]
    if not trained:
        return Skipped(NO_TURN)
    template = Renderer(tokens, row.where, row.content.get("tools"))
    if parts := left_out(messages, row.content.get("tools"), template.text):
        return Skipped(f"{LEFT_OUT}: {parts}")
    whole = template.render(messages)
    if GENERATION.search(template.text):
        chat = _generated(row, tokens, whole, assistants)
    else:
        turns = []
        for index in assistants:
            span = template.turn(messages, index, whole)
            if span is None:
                return _apart(row, tokens, template, trained)
            turns.append(Turn(span, index in trained))
        chat = Chat(whole.text, whole.literals, turns)
    return [chat] if _complete(chat, messages, assistants) else Skipped(LEFT_OUT)


class Renderer:
    """A tokenizer's template on the messages of one row."""

    def __init__(self, tokens: Tokens, where: str, tools: Any = None) -> None:
        self._tokens, self._where, self._tools = tokens, where, tools
        tokenizer = tokens.tokenizer
        if not tokenizer.is_fast:
            raise TokenizerError(
                f"{where}: the tokenizer does not say where in a text its tokens are",
                "use a tokenizer with tokenizer.json, or rows of prompt and completion",
            )
        if not tokenizer.chat_template:
            raise TokenizerError(
                f"{where}: the tokenizer has no chat template",
                "use rows of prompt and completion, or name one with --chat_template",
            )
        try:
            self.text = str(tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise TokenizerError(f"{where}: {error}", "name one template default") from error
        check_template(self.text, where)

    def render(self, messages: list[dict[str, Any]], header: bool = False) -> _Rendering:
        """The text of some messages; `header` adds what comes before an answer."""
        hidden: list[str] = []
        shown = [
            self._hide(for_template(message, self.text), message["role"], hidden)
            for message in messages
        ]
        size = len(json.dumps([shown, self._tools])) + sum(map(len, hidden))
        variables = {
            **self._tokens.tokenizer.special_tokens_map,
            "messages": shown,
            "tools": self._hide(self._tools, "system", hidden),
            "documents": None,
            "add_generation_prompt": header,
        }
        return self._shown(render(self.text, self._where, variables, size), hidden)

    def turn(self, messages: list[dict[str, Any]], index: int, whole: _Rendering) -> Span | None:
        """Where message `index` is in `whole`, or None where the renderings do not concatenate."""
        before = self.render(messages[:index], header=True)
        after = self.render(messages[: index + 1])
        first, last = len(before.text), len(after.text)
        if not (whole.text.startswith(before.text) and whole.text.startswith(after.text)):
            return None
        if first >= last:
            return None
        # A line end behind the end token is the template's: generation has stopped before it.
        text = whole.text[first:last].rstrip()
        if text.endswith(tuple(self._tokens.special)) and first + len(text) not in {
            end for _, end in whole.literals
        }:
            last = first + len(text)
        return first, last

    def _hide(self, value: Any, role: str, hidden: list[str]) -> Any:
        """A copy in which control tokens, and our own marks, are numbers between marks."""
        if isinstance(value, str):
            pattern = self._tokens.controls(self.text, role == "assistant")

            def number(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{LITERAL}{len(hidden) - 1}{LITERAL}"

            marked = re.compile(f"{pattern.pattern}|[{OPEN}{CLOSE}{LITERAL}]")
            return marked.sub(number, value)
        if isinstance(value, dict):
            return {key: self._hide(item, role, hidden) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hide(item, role, hidden) for item in value]
        return value

    def _shown(self, text: str, hidden: list[str]) -> _Rendering:
        """The rendering without marks, and where they were."""
        result, parts, length, done = _Rendering(""), list[str](), 0, 0
        opened: list[int] = []
        for match in MARKS.finditer(text):
            parts.append(text[done : match.start()])
            length += match.start() - done
            done = match.end()
            if match[0] == OPEN:
                opened.append(length)
            elif match[0] == CLOSE:
                result.generated.append((opened.pop(), length))
            else:
                literal = hidden[int(match[1])]
                result.literals.append((length, length + len(literal)))
                parts.append(literal)
                length += len(literal)
        parts.append(text[done:])
        result.text = "".join(parts)
        return result


def _generated(row: Row, tokens: Tokens, whole: _Rendering, assistants: list[int]) -> Chat:
    """The turns that the template marks itself."""
    messages, spans = row.content["messages"], whole.generated
    if len(spans) != len(assistants):
        raise TokenizerError(
            f"{row.where}: the chat template's {{% generation %}} marks {len(spans)} of the "
            f"{len(assistants)} assistant turns",
            "mark every assistant turn in the template, or take the marks out",
        )
    # A model that never sees the end of its turn trained does not learn to stop.
    special = tuple(tokens.special)
    for number, (first, last) in enumerate(spans):
        until = spans[number + 1][0] if number + 1 < len(spans) else len(whole.text)
        rest = whole.text[last:until]
        is_last = assistants[number] == len(messages) - 1
        outside = rest.startswith(special) if not is_last else any(s in rest for s in special)
        inside = whole.text[first:last].rstrip().endswith(special)
        if outside and not inside:
            raise TokenizerError(
                f"{row.where}: the chat template's {{% generation %}} leaves out the turn's end "
                "token",
                "put the end token inside {% generation %}, or take the marks out",
            )
    turns = [
        Turn(span, bool(messages[i].get("weight", 1)))
        for i, span in zip(assistants, spans, strict=True)
    ]
    return Chat(whole.text, whole.literals, turns)


def _apart(
    row: Row, tokens: Tokens, template: Renderer, trained: list[int]
) -> list[Chat] | Skipped:
    """One chat for each trained turn, for templates that write earlier turns differently."""
    result = []
    for index in trained:
        messages = row.content["messages"][: index + 1]
        whole = template.render(messages)
        span = template.turn(messages, index, whole)
        if span is None:
            raise TokenizerError(
                f"{row.where}: the chat template's rendering of message {index} does not begin "
                "with its rendering of the messages before, so its place cannot be told",
                "use a template with {% generation %}, or rows of prompt and completion",
            )
        chat = Chat(whole.text, whole.literals, [Turn(span, True)])
        if not _complete(chat, messages, [index]):
            return Skipped(LEFT_OUT)
        result.append(chat)
    return result


def _complete(chat: Chat, messages: list[dict[str, Any]], assistants: list[int]) -> bool:
    """Whether every message's text is in the chat, an assistant's in its own turn.

    A template may trim, write JSON, or put thoughts (`</think>`) elsewhere.
    """
    spans = dict(zip(assistants, (turn.span for turn in chat.turns), strict=True))
    for index, message in enumerate(messages):
        text = message.get("content", "").strip()
        place = chat.text
        if message["role"] == "assistant":
            if index not in spans:
                continue
            text = text.rpartition("</think>")[2].strip()
            place = chat.text[slice(*spans[index])]
        if text not in place and json.dumps(text, ensure_ascii=False)[1:-1] not in place:
            return False
    return True


def header_text(content: str, tokens: Tokens) -> tuple[str, list[Span]]:
    """What comes before the answer to a first message, for generation."""
    template = Renderer(tokens, "prompt")
    rendering = template.render([{"role": "user", "content": content}], header=True)
    if not rendering.text:
        raise DataError("prompt: the chat template writes nothing", "use another template")
    return rendering.text, rendering.literals

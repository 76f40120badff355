"""Messages to the text that a chat template writes, and where in it control tokens are text.

Control tokens in messages are hidden from the template behind numbers, and put back as spans in
which they are plain text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.data.chat_template import CLOSE, LITERAL, OPEN, ChatOptions, check_template, render
from qlora_kit.data.tokens import Span, Tokens
from qlora_kit.data.turns import REASONING, for_template, left_out
from qlora_kit.errors import DataError, TokenizerError

MARKS = re.compile(f"{LITERAL}(\\d+){LITERAL}|{OPEN}|{CLOSE}")
THOUGHT = "</think>"
"""What ends the thoughts that stand in the text of an answer."""

SYSTEM = ("system", "developer")

Messages = list[dict[str, Any]]


@dataclass
class Rendering:
    """A template's text, where in it control tokens are text, and what it marks as generated."""

    text: str
    literals: list[Span] = field(default_factory=list)
    generated: list[Span] = field(default_factory=list)

    def part(self, first: int, last: int | None = None) -> Rendering:
        """The characters from `first` to `last`."""
        last = len(self.text) if last is None else last
        inside = [(a - first, b - first) for a, b in self.literals if first <= a and b <= last]
        return Rendering(self.text[first:last], inside)

    def __add__(self, other: Rendering) -> Rendering:
        shift = len(self.text)
        behind = [(a + shift, b + shift) for a, b in other.literals]
        return Rendering(self.text + other.text, self.literals + behind)


class Renderer:
    """A tokenizer's template on the messages of one row."""

    def __init__(self, tokens: Tokens, where: str, options: ChatOptions, tools: Any = None) -> None:
        self._tokens, self.where, self._options, self._tools = tokens, where, options, tools
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
        self.special, self.added = tuple(tokens.special), tuple(tokens.added)
        self.ends = tuple(tokens.special - {tokenizer.bos_token})
        """what may end a turn by beginning the next message"""

    def adapted(self, messages: Messages) -> Messages:
        """The messages in the form in which the template can write all of them.

        Thoughts stand in the content for a template that looks for their end there and knows no
        field for them; with `merge_system`, a system text that it does not take stands before the
        first user's.
        """
        if THOUGHT in self.text and left_out([dict.fromkeys(REASONING)], None, self.text):
            messages = [_with_thoughts_in_content(message) for message in messages]
        return self._merged(messages) if self._options.merge_system else messages

    def render(self, messages: Messages, header: bool = False) -> Rendering:
        """The text of some messages; `header` adds what comes before an answer."""
        hidden: list[str] = []
        shown = [
            self._hide(for_template(message, self.text), message["role"], hidden)
            for message in messages
        ]
        size = len(json.dumps([shown, self._tools])) + sum(map(len, hidden))
        variables = {
            **self._tokens.tokenizer.special_tokens_map,
            **self._options.variables,
            "messages": shown,
            "tools": self._hide(self._tools, "system", hidden),
            "documents": None,
            "add_generation_prompt": header,
        }
        text = render(self.text, self.where, variables, size, self._options.date)
        return _with_places(text, hidden)

    def own_text(self, text: str) -> Rendering:
        """A text of an assistant as it is, without what the template writes around it."""
        hidden: list[str] = []
        return _with_places(self._hide(text, "assistant", hidden), hidden)

    def _merged(self, messages: Messages) -> Messages:
        user = next((i for i, one in enumerate(messages) if one["role"] == "user"), None)
        if messages[0]["role"] not in SYSTEM or user is None or self._takes_system(messages, user):
            return messages
        system, first = messages[0]["content"], messages[user]
        both = {**first, "content": f"{system}\n\n{first['content']}"}
        return [*messages[1:user], both, *messages[user + 1 :]]

    def _takes_system(self, messages: Messages, user: int) -> bool:
        try:
            written = self.render(messages[: user + 1], header=True)
        except DataError:
            return False
        return is_written(messages[0], written.text)

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


def _with_places(text: str, hidden: list[str]) -> Rendering:
    """A text without its marks, and where they were."""
    result, parts, length, done = Rendering(""), list[str](), 0, 0
    opened: list[int] = []
    for match in MARKS.finditer(text):
        parts.append(text[done : match.start()])
        length += match.start() - done
        done = match.end()
        if match[0] == OPEN:
            opened.append(length)
        elif match[0] == CLOSE:
            first = opened.pop()
            if not opened and first < length:
                result.generated.append((first, length))
        else:
            literal = hidden[int(match[1])]
            result.literals.append((length, length + len(literal)))
            parts.append(literal)
            length += len(literal)
    parts.append(text[done:])
    result.text = "".join(parts)
    return result


def _thoughts(message: dict[str, Any]) -> str | None:
    return next((message[name] for name in REASONING if name in message), None)


def _with_thoughts_in_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts in its content, as a model writes them."""
    thoughts = _thoughts(message)
    if thoughts is None:
        return message
    rest = {name: value for name, value in message.items() if name not in REASONING}
    return {**rest, "content": f"<think>\n{thoughts}\n{THOUGHT}\n\n{message.get('content', '')}"}


def is_written(message: dict[str, Any], text: str, thoughts: bool = False) -> bool:
    """Whether a message's text is in `text`; with `thoughts`, an assistant's thoughts too.

    A template may trim, write JSON, or put thoughts (`</think>`) elsewhere.
    """
    content = message.get("content", "")
    parts = [content]
    if message["role"] == "assistant":
        thought, _, answer = content.rpartition(THOUGHT)
        parts = [answer]
        if thoughts:
            parts += [thought.replace("<think>", ""), _thoughts(message) or ""]
    return all(
        part.strip() in text or json.dumps(part.strip(), ensure_ascii=False)[1:-1] in text
        for part in parts
    )


def unwritten_texts(template: Renderer, messages: Messages, header: bool = False) -> list[int]:
    """The places of the messages whose text a template does not write, of those as they came.

    That "22" stands in a chat does not say that a tool's answer "22" does, where an assistant says
    "It is 22 degrees": so the messages are rendered with texts that occur nowhere else.
    """
    probes = [f"text{at}of{len(messages)}" for at in range(len(messages))]
    other = [
        {**message, "content": probe} if message.get("content", "").strip() else message
        for message, probe in zip(messages, probes, strict=True)
    ]
    try:
        text = template.render(template.adapted(other), header).text
    except DataError:  # a template that reads something out of its texts
        return []
    return [at for at, message in enumerate(other) if not is_written(message, text)]


def header_text(messages: Messages, tokens: Tokens, options: ChatOptions) -> Rendering:
    """What comes before the answer to some messages, for generation."""
    template = Renderer(tokens, "prompt", options)
    rendering = template.render(template.adapted(messages), header=True)
    if not rendering.text:
        raise DataError("prompt: the chat template writes nothing", "use another template")
    return rendering

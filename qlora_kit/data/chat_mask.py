"""A chat to its rendered text, and which characters of it are an assistant's turn to write.

The turns are where the template says `{% generation %}`: the union of its marks, as transformers
has it. Else turn i is what the rendering of the first i + 1 messages has more than that of the
first i with the header of an answer; each of these must be the beginning of the whole, which is
checked. A template that writes a turn differently once others follow (Qwen 3 takes the thoughts
out) gives one chat for each assistant turn, with the messages up to it, as the model will meet it.

Where even that rendering does not begin with the prompt (the prompt of R1's distills ends in
`<think>`, Mistral v0.3 writes the system text with a user's turn that comes last), the chat is the
prompt and behind it the turn's own text with its end token. Where the own text begins is found by
rendering the turn with other contents. Ids are never searched for.

Control tokens in messages are hidden from the template behind numbers, and put back as spans in
which they are plain text. What a template leaves out of a message is noticed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.rows import Row
from qlora_kit.data.sandbox import CLOSE, LITERAL, OPEN, check_template, render
from qlora_kit.data.tokens import Skipped, Span, Tokens
from qlora_kit.data.turns import REASONING, for_template, left_out
from qlora_kit.errors import DataError, TokenizerError

NO_TURN = "no assistant turn"
LEFT_OUT = "the chat template leaves out a part of a message"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = re.compile(f"{LITERAL}(\\d+){LITERAL}|{OPEN}|{CLOSE}")
THOUGHT = "</think>"
"""What ends the thoughts that stand in the text of an answer."""

LONGEST_LEAD, LONGEST_END = 256, 2**20
"""Characters that a template may write between the header of an answer and its text, and those of
a last message with its header."""

SYSTEM = ("system", "developer")

Messages = list[dict[str, Any]]


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


def chats(row: Row, tokens: Tokens, options: ChatOptions) -> list[Chat] | Skipped:
    """The chats to train on for a row: one, or one for each trained assistant turn.

    Errors: `TokenizerError` where the template does not show where a turn begins and ends,
    `DataError` where it refuses the messages.
    """
    template = Renderer(tokens, row.where, options, row.content.get("tools"))
    messages = template.told(row.content["messages"])
    assistants = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    trained = [i for i in assistants if messages[i].get("weight", 1)]
    if options.train_on == "last":
        trained = trained[-1:]
    if not trained:
        return Skipped(NO_TURN)
    if parts := left_out(messages, row.content.get("tools"), template.text):
        return Skipped(f"{LEFT_OUT}: {parts}")
    try:
        if GENERATION.search(template.text):
            found = _marked(template, messages, trained)
        else:
            found = _found(template, messages, assistants, trained)
    except DataError as error:
        if messages[0]["role"] not in SYSTEM or options.merge_system:
            raise
        raise DataError(
            error.problem, "give --merge_system where the template takes no system message"
        ) from error
    return found if found else Skipped(LEFT_OUT)


def _found(
    template: Renderer, messages: Messages, assistants: list[int], trained: list[int]
) -> list[Chat]:
    """Chats by comparing renderings; none where the template leaves out a part of a message."""
    whole = template.render(messages)
    turns = []
    for index in assistants:
        span = template.turn(messages, index, whole)
        learnt = index in trained
        if span is None or not _written(messages[index], whole.text[slice(*span)], learnt):
            return _apart(template, messages, trained)
        turns.append(Turn(span, learnt))
    complete = all(_written(message, whole.text) for message in messages)
    return [Chat(whole.text, whole.literals, turns)] if complete else []


def _apart(template: Renderer, messages: Messages, trained: list[int]) -> list[Chat]:
    """One chat for each trained turn, for templates that write earlier turns differently."""
    result = []
    for index in trained:
        part = messages[: index + 1]
        whole = template.render(part)
        span = template.turn(part, index, whole)
        chat: Chat | None = None
        if span is not None and _written(part[-1], whole.text[slice(*span)], thoughts=True):
            chat = Chat(whole.text, whole.literals, [Turn(span, True)])
        else:
            chat = template.met(part)
        if chat is None and span is not None:
            return []
        if chat is None:
            raise TokenizerError(
                f"{template.where}: the chat template's rendering of message {index} does not "
                "begin with its rendering of the messages before, so its place cannot be told",
                "use a template with {% generation %}, or rows of prompt and completion",
            )
        own = chat.text[slice(*chat.turns[0].span)]
        if not all(_written(one, chat.text) for one in part) or not _written(part[-1], own, True):
            return []
        result.append(chat)
    return result


def _marked(template: Renderer, messages: Messages, trained: list[int]) -> list[Chat]:
    """Chats by the template's own marks; none where it leaves out a part of a message.

    One chat, or one for each trained turn where later turns take something of earlier ones away.
    """
    chat, owners = _by_marks(template, messages, trained)
    if not all(_written(message, chat.text) for message in messages):
        return []
    if all(_written(messages[i], _own(chat, owners, i), thoughts=True) for i in trained):
        return [chat]
    result = []
    for index in trained:
        part = messages[: index + 1]
        chat, owners = _by_marks(template, part, [index])
        if not _written(part[-1], _own(chat, owners, index), thoughts=True):
            return []
        result.append(chat)
    return result


def _own(chat: Chat, owners: list[int], index: int) -> str:
    """All that is marked in the turn of message `index`."""
    spans = [turn.span for turn, owner in zip(chat.turns, owners, strict=True) if owner == index]
    # A turn without a mark of its own is not looked at: what is learnt is the union of the marks.
    return chat.text[spans[0][0] : spans[-1][1]] if spans else chat.text


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

    @property
    def special(self) -> tuple[str, ...]:
        """The tokenizer's special tokens."""
        return tuple(self._tokens.special)

    def told(self, messages: Messages) -> Messages:
        """The messages in the form in which the template can write all of them.

        Thoughts stand in the content for a template that looks for their end there and knows no
        field for them; with `merge_system`, a system text that it does not take stands before the
        first user's.
        """
        if THOUGHT in self.text and left_out([dict.fromkeys(REASONING)], None, self.text):
            messages = [_thought_aloud(message) for message in messages]
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
        return _shown(text, hidden)

    def turn(self, messages: Messages, index: int, whole: Rendering) -> Span | None:
        """Where message `index` is in `whole`, or None where the renderings do not concatenate."""
        before = self.render(messages[:index], header=True)
        after = self.render(messages[: index + 1])
        first, last = len(before.text), len(after.text)
        if not (whole.text.startswith(before.text) and whole.text.startswith(after.text)):
            return None
        if first >= last:
            return None
        return first, first + self.end(whole.part(first, last))

    def end(self, turn: Rendering) -> int:
        """How much of a turn's text is to be learnt: all of it, or up to its end token.

        A line end behind the end token is the template's: generation has stopped before it.
        """
        text = turn.text.rstrip()
        literal = len(text) in {last for _, last in turn.literals}
        ended = text.endswith(tuple(self._tokens.special)) and not literal
        return len(text) if ended else len(turn.text)

    def met(self, messages: Messages) -> Chat | None:
        """The prompt of the last message and behind it the message's own text and its end.

        None where the template does not show where the own text begins.
        """
        *before, message = messages
        prompt, whole = self.render(before, header=True), self.render(messages)
        plain: dict[str, Any] = {n: message[n] for n in ("role", "name") if n in message}
        one, other = (self.render([*before, {**plain, "content": text}]) for text in ("a", "1"))
        frame = os.path.commonprefix((one.text, other.text))  # noqa: RUF071
        surplus, lead = self._behind_header(before, prompt.text, frame)
        if surplus is None:
            return None
        closing = one.part(len(frame) + 1)
        frame = frame[: len(frame) - len(lead)]
        # Words behind an answer are what a template writes at the end of every chat.
        if not whole.text.startswith(frame) or self._has_words(closing.text):
            return None
        turn = whole.part(len(frame))
        turn = turn.part(0, self.end(turn))
        content = message.get("content") or ""
        if THOUGHT in content and content.partition(THOUGHT)[0].strip() not in turn.text:
            # The template writes without its thoughts what the model has to write with them.
            hidden: list[str] = []
            own = _shown(self._hide(content.strip(), "assistant", hidden), hidden)
            turn = own + closing.part(0, self.end(closing))
        # What the prompt ends with already is not written twice.
        for already in (surplus, surplus.strip()):
            if already and turn.text.startswith(already):
                turn = turn.part(len(already))
                break
        text = prompt + turn
        span = len(prompt.text), len(text.text)
        return Chat(text.text, text.literals, [Turn(span, True)]) if turn.text else None

    def _has_words(self, text: str) -> bool:
        for token in sorted(self._tokens.special, key=len, reverse=True):
            text = text.replace(token, "")
        return bool(text.strip())

    def _behind_header(
        self, before: Messages, prompt: str, frame: str
    ) -> tuple[str, str] | tuple[None, str]:
        """What a prompt and a frame have behind the header of an answer that both share."""
        shared = len(os.path.commonprefix((prompt, frame)))  # noqa: RUF071
        # Both may go on with another control token, and these begin alike.
        for match in re.finditer(r"<[^<>\s]+>|\[[A-Z_]+\]", prompt):
            if match.start() < shared < match.end() and match[0] in self._tokens.added:
                shared = match.start()
        surplus, lead = prompt[shared:], frame[shared:]
        # Where each goes on in its own way, that must be behind a control token: else it is a
        # header that the template does not write.
        parted = not (surplus and lead) or prompt[:shared].endswith(tuple(self._tokens.added))
        least = len(self.render(before).text)
        if parted and shared >= least:
            return surplus, lead
        # What is before the header is written in two ways: the same last message and header end it.
        found = _aligned(prompt, frame, max(0, len(prompt) - least))
        if found is None:
            return None, ""
        surplus, lead, common = found
        header = len(prompt) - least - len(surplus)
        if _written(before[-1], common) or 0 < header <= len(common):
            return surplus, lead
        return None, ""

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
        return _written(messages[0], written.text)

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


def _shown(text: str, hidden: list[str]) -> Rendering:
    """The rendering without marks, and where they were."""
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


def _aligned(prompt: str, frame: str, header: int) -> tuple[str, str, str] | None:
    """What a prompt has behind the end that both share, what a frame has, and that end.

    Both end with the same last message and the header of an answer. The prompt may go on with what
    it gives the model to begin with, the frame with what the template writes before an answer's
    text. Of all the ways to cut both, the one that leaves the longest common end.
    """
    backwards, other = prompt[-LONGEST_END:][::-1], frame[-LONGEST_END:][::-1]
    # What a prompt has behind the shared end is at most the header that it writes.
    cuts = [(surplus, 0) for surplus in range(min(LONGEST_LEAD, len(backwards), header + 1))]
    cuts += [(0, lead) for lead in range(1, min(LONGEST_LEAD, len(other)))]
    shared = {
        cut: len(os.path.commonprefix((backwards[cut[0] :], other[cut[1] :])))  # noqa: RUF071
        for cut in cuts
    }
    surplus, lead = max(cuts, key=shared.__getitem__, default=(0, 0))
    end = len(prompt) - surplus
    common = prompt[end - shared.get((surplus, lead), 0) : end]
    return (prompt[end:], frame[len(frame) - lead :], common) if common else None


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


def _thoughts(message: dict[str, Any]) -> str | None:
    return next((message[name] for name in REASONING if name in message), None)


def _thought_aloud(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts in its content, as a model writes them."""
    thoughts = _thoughts(message)
    if thoughts is None:
        return message
    rest = {name: value for name, value in message.items() if name not in REASONING}
    return {**rest, "content": f"<think>\n{thoughts}\n{THOUGHT}\n\n{message.get('content', '')}"}


def _written(message: dict[str, Any], text: str, thoughts: bool = False) -> bool:
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


def header_text(
    messages: Messages, tokens: Tokens, options: ChatOptions, tools: Any = None
) -> Rendering:
    """What comes before the answer to some messages, for generation."""
    template = Renderer(tokens, "prompt", options, tools)
    rendering = template.render(template.told(messages), header=True)
    if not rendering.text:
        raise DataError("prompt: the chat template writes nothing", "use another template")
    return rendering

"""What a chat template writes around the messages, found by rendering it, as a Go template.

Ollama takes templates in Go's language, not in Jinja's. Most templates of models write fixed texts
around messages of a system, users and an assistant that take turns. Such a one is known wholly by
what stands between messages whose texts are made up: `ChatForm`. It is held against the template on
further chats; one that it does not reproduce to the letter has no form, and no template is written.

Left out: tools, and spaces around a message that a template takes away (Go's language cannot).

Sources: Ollama's docs/template.md and template/template.go, which gives a template `.System`, all
system texts, and `.Messages`, those of one role in succession made one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions
from qlora_kit.data.rendering import Messages, header_text
from qlora_kit.data.tokens import Tokens
from qlora_kit.errors import QloraKitError

Render = Callable[[Messages], str]
BRACES = re.compile(r"\{\{|\{\Z")
"""Go reads `{{{` as `{{` and a `{`: a text that an action comes behind cannot end in one."""
ONE_LEFT = "eq (len (slice $.Messages $i)) 1"
"""In Go: whether the message of a loop is the last."""


@dataclass(frozen=True)
class ChatForm:
    """The texts around the messages of a chat that ends with a user's, before the answer.

    `opening` stands before a chat without a system text; with one, `system` stands around it.
    `late` says that the system text stands in the last user's message and not before the first.
    """

    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    closing: str
    late: bool = False

    def text(self, messages: Messages) -> str:
        """What the template writes for messages: a system's or none, then users' and answers."""
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        parts, before = [self.opening], ""
        if rest is not messages:
            before = messages[0]["content"].join(self.system)
            if not self.late:
                parts = [before]
        for place, message in enumerate(rest):
            around = self.user if message["role"] == "user" else self.assistant
            last = self.late and place == len(rest) - 1
            parts += [around[0], before if last else "", message["content"], around[1]]
        return "".join([*parts, self.closing])

    def go(self) -> str:
        """The same as a Go template for Ollama."""
        user, assistant = self.user, self.assistant
        system = f"{_go(self.system[0])}{{{{ $.System }}}}{_go(self.system[1])}"
        if self.late:
            opening = _go(self.opening)
            condition = f"{{{{ if and $.System ({ONE_LEFT}) }}}}"
            folded = f"{condition}{system}{{{{ end }}}}"
        else:
            other = f"{{{{ else }}}}{_go(self.opening)}" if self.opening else ""
            opening, folded = f"{{{{ if .System }}}}{system}{other}{{{{ end }}}}", ""
        return (
            f"{opening}{{{{ range $i, $_ := .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{_go(user[0])}{folded}{{{{ .Content }}}}{_go(user[1])}'
            f'{{{{ else if eq .Role "assistant" }}}}{_go(assistant[0])}{{{{ .Content }}}}'
            f"{_go(assistant[1])}{{{{ end }}}}{{{{ end }}}}{_go(self.closing)}"
        )


def chat_form(
    tokenizer: Any, options: ChatOptions = NO_OPTIONS, start: str = ""
) -> ChatForm | None:
    """The form of a tokenizer's chat template; None where it has none.

    A template that refuses a system text is given it before the first user's. `start` is what
    somebody else puts before the text: the form has it not.
    """
    tokens = Tokens(tokenizer)
    for merged in dict.fromkeys((options.merge_system, True)):
        chosen = replace(options, merge_system=merged)

        def render(messages: Messages, chosen: ChatOptions = chosen) -> str:
            return header_text(messages, tokens, chosen).text.removeprefix(start)

        for late in (False, True):
            try:
                found = _found(render, late)
            except QloraKitError:
                break
            if found is not None and all(found.text(one) == render(one) for one in _chats()):
                return found
    return None


def _found(render: Render, late: bool) -> ChatForm | None:
    """The form that two chats have; None where they have none."""
    names = ["Qsys", "Quse1", "Qans1", "Quse2", "Qans2", "Quse3"]
    placed = [*names[1:5], names[0], names[5]] if late else names
    with_system = _between(render(_chat(names[1:], names[0])), placed)
    alone = _between(render(_chat(names[1:])), names[1:])
    if with_system is None or alone is None:
        return None
    opening, answer, question, *_, end = alone
    system = tuple(with_system[4:6] if late else with_system[:2])
    # What stands between two messages belongs to both. What comes before every user's message is
    # the user's; so is what comes before an answer, as far as it is written before one that is
    # still to be made.
    sources = [opening, question] if late else [opening, question, system[1]]
    before_user = _common_end(sources).lstrip(">]|")
    behind_user = commonprefix([answer, end])  # noqa: RUF071
    cut = len(before_user)
    if late:
        inside = system[0].removeprefix(question)
        if not system[0].startswith(question):
            return None
        system = (inside, system[1])
    else:
        system = (system[0], _without_end(system[1], cut))
    return ChatForm(
        _without_end(opening, cut),
        (system[0], system[1]),
        (before_user, behind_user),
        (answer[len(behind_user) :], _without_end(question, cut)),
        end[len(behind_user) :],
        late,
    )


def _between(text: str, parts: Sequence[str]) -> list[str] | None:
    """What stands around parts of a text in their order; None where one is missing or twice."""
    found, rest = [], text
    for part in parts:
        if text.count(part) != 1 or part not in rest:
            return None
        before, _, rest = rest.partition(part)
        found.append(before)
    return [*found, rest]


def _common_end(texts: Sequence[str]) -> str:
    return commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071


def _without_end(text: str, length: int) -> str:
    return text[: len(text) - length]


def _chat(texts: Sequence[str], system: str | None = None) -> Messages:
    """Messages of a user and an assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]
    return [*first, *turns]


def _chats() -> list[Messages]:
    """Chats that a form is held against."""
    texts = ["What is 2 + 2?", "It is 4.", "Why?\n\nSay it.", "So.", "é 🙂", "Yes!", "Bye"]
    return [
        _chat(texts[:length], system) for length in (1, 3, 5, 7) for system in (None, "Be brief.")
    ]


def _go(text: str) -> str:
    """A text as it stands in a Go template, before an action too."""
    return BRACES.sub(r'{{ "\g<0>" }}', text)

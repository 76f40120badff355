"""A conversation with a base and its adapters: the turns, and the answers to a message.

The turns are one list, whoever answers: a switch to another adapter, or to the base, changes who
goes on with them. Several that answer the same message are rows of one batch, and the turn has the
answer of the one in use. What a message becomes is what the rows of an adapter's training became:
the chat template, with the options of the run that made the adapter; or, in a plain conversation,
the message alone with a line end, as in rows of prompts and completions.

Turns that no longer fit the model's context are left out from the front; the system's text stays.
An answer has its room first, up to half of the context.
An answer that is stopped (the generator of its events is closed, or something passes through it
that is no error) is kept as far as it has come.

Left out: tools, and the cache of a turn for the next one, which would have to be taken back token
by token where an adapter or a template changes what was said.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_kit.config.generation import BASE
from qlora_kit.data.answers import unwritten
from qlora_kit.errors import ConfigError
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request, Ticket
from qlora_kit.generation.sampling import Sampling
from qlora_kit.generation.text import AnswerText
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.run.chat_events import Began, Ended, Event, Note, Piece
from qlora_kit.run.prompt_format import PromptFormat

Events = Generator[Event, None, None]
"""Closed early, an answer is stopped."""


class Turn(NamedTuple):
    """A message and its answer."""

    message: str
    answer: str


@dataclass(frozen=True)
class Answering:
    """Who answers, and how: prompts in the format of each, and how tokens are drawn."""

    bank: AdapterBank
    engine: Engine
    formats: Mapping[str | None, PromptFormat]
    sampling: Sampling
    max_new_tokens: int
    stops: Sequence[str] = ()
    plain: bool = False

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.bank.base.context


class Conversation:
    """The turns so far, and who answers next: an adapter by name, or None for the base."""

    def __init__(
        self, answering: Answering, adapter: str | None = None, system: str | None = None
    ) -> None:
        self.by, self.adapter, self.system = answering, adapter, system
        self.turns: list[Turn] = []
        self._left_out = 0

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._left_out = [], 0

    def ids(self, message: str, adapter: str | None) -> list[int]:
        """What is read before the answer to a message behind the turns that are not left out."""
        written = self.by.formats[adapter]
        if self.by.plain:
            return written.prompt_ids(f"{message}\n")
        return written.chat_ids(self._messages(message))

    def answer(self, message: str, adapters: Sequence[str | None]) -> Events:
        """The answers of some adapters, the one in use among them, to a message.

        Errors: `ConfigError` for a message that is too long, `DataError` for one that the template
        refuses, what ended an answer; the turns are as before then.
        """
        by, before = self.by, self._left_out
        prompts = self._fitting(message, adapters)
        room = min(by.max_new_tokens, by.context - max(map(len, prompts)))
        if self._left_out > before == 0:
            yield Note(
                f"the conversation and an answer no longer fit the model's context of {by.context} "
                "tokens: the oldest turns are left out from here on"
            )
        yield Began(tuple(one or BASE for one in adapters))
        formats = [by.formats[adapter] for adapter in adapters]
        answers = [
            AnswerText(written.tokenizer, after=ids, stops=by.stops)
            for written, ids in zip(formats, prompts, strict=True)
        ]
        tickets, texts = list[Ticket](), [""] * len(adapters)
        going, failed = set(range(len(adapters))), False
        try:
            for written, ids, adapter in zip(formats, prompts, adapters, strict=True):
                asked = Request(ids, room, written.ends, by.sampling, adapter)
                tickets.append(by.engine.add(asked))
            for place, token in self._tokens(tickets):
                if place not in going:
                    continue
                answer = answers[place]
                if piece := answer.finish() if token is None else answer.push(token):
                    texts[place] += piece
                    yield Piece(place, piece)
                if token is None or answer.stopped:
                    by.engine.drop(tickets[place])
                    going.remove(place)
                    is_cut = tickets[place].end == "length" and not answer.stopped
                    why = f"cut after {room} tokens" if is_cut else None
                    yield Ended(place, why if texts[place].strip() else "an empty answer")
        except Exception:
            failed = True
            raise
        finally:
            for ticket in tickets:
                by.engine.drop(ticket)
            kept = adapters.index(self.adapter)
            # Of an answer that is stopped before anything has come, the message is taken back.
            if not failed and (texts[kept] or kept not in going):
                self.turns.append(Turn(message, texts[kept]))

    def _tokens(self, tickets: Sequence[Ticket]) -> Iterator[tuple[int, int | None]]:
        """Places and tokens, None at the end of each. Errors: what ended an answer."""
        places = {ticket: place for place, ticket in enumerate(tickets)}
        while not self.by.engine.idle:
            for ticket, token in self.by.engine.step():
                if ticket.error is not None:
                    raise ticket.error
                yield places[ticket], token

    def _fitting(self, message: str, adapters: Sequence[str | None]) -> list[list[int]]:
        """The prompts of some adapters, with as many of the last turns as leave room to answer.

        Room is kept for `max_new_tokens`, but not for more than half of the context, beside which
        there would soon be no turns. Where a message alone leaves less, the answer is shorter.
        Errors: `ConfigError` for one that leaves none.
        """
        context, before = self.by.context, self._left_out
        kept = min(self.by.max_new_tokens, context // 2)
        while True:
            prompts = [self.ids(message, adapter) for adapter in adapters]
            longest = max(map(len, prompts))
            if longest + kept <= context or self.by.plain or self._left_out >= len(self.turns):
                break
            self._left_out += 1
        if longest >= context:
            self._left_out = before
            raise ConfigError(
                f"the message has {longest} tokens, and the model's context is {context}",
                "send a shorter one",
            )
        return prompts

    def _messages(self, message: str) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[self._left_out :]:
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": message}]


def check_system(written: PromptFormat, text: str | None) -> None:
    """Refuse a text of the system that a chat template leaves out or refuses.

    Errors: `ConfigError`, `DataError`, those of the template.
    """
    if text:
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]
        if unwritten(messages, written.tokenizer, written.chat):
            raise ConfigError(
                "the chat template leaves out what the system says", "say it in a message"
            )

"""The lines of a chat: a message, or after a slash a command."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from qlora_kit.config.commands import ChatConfig
from qlora_kit.config.generation import BASE, SamplingConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.errors import AdapterError, ConfigError, DataError, excerpt
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.sampling import Sampling
from qlora_kit.options.checks import size_text
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.chat_events import Left, Note
from qlora_kit.run.conversation import Answering, Conversation, Events, check_system
from qlora_kit.run.named_base import Named
from qlora_kit.run.trained_form import form_note

# A command that takes something names it.
HELP = {
    "/use NAME": "let an adapter answer from here on",
    "/base": "let the base answer, without an adapter",
    "/compare [TEXT]": "base and adapter answer it, or the last message, side by side",
    "/adapters": "the adapters that are here",
    "/system [TEXT]": "what the system says before the first message, or nothing",
    "/reset": "forget all turns",
    "/help": "these lines",
    "/quit": "leave, as ^D does",
}


class Lines:
    """What the lines of a chat do to its conversation."""

    def __init__(self, conversation: Conversation, note: str | None = None) -> None:
        self.conversation = conversation
        self.note = note
        """What a user should know before the first line."""
        self._compared = conversation.adapter
        self._commands: dict[str, Callable[[str], Events]] = {
            "use": self._use,
            "base": self._base,
            "compare": self._compare,
            "adapters": self._adapters,
            "system": self._system,
            "reset": self._reset,
            "help": self._help,
            "quit": self._quit,
        }

    @property
    def name(self) -> str:
        """Who answers next."""
        return self.conversation.adapter or BASE

    @property
    def described(self) -> str:
        """The base, and what is on it."""
        bank = self.conversation.by.bank
        said, bits = bank.base.source.name, bank.base.quantization.bits
        read = "each message alone" if self.conversation.by.plain else "in its chat template"
        return f"{said} in {bits} bits, {read}, with {', '.join(bank.names) or 'no adapter'}"

    def completions(self, begun: str) -> list[str]:
        """The commands that begin so, and `/use` with the name of each adapter."""
        names = (*self.conversation.by.bank.names, BASE)
        known = [f"/{one}" for one in self._commands] + [f"/use {name}" for name in names]
        return [one for one in known if one.startswith(begun)]

    def hear(self, line: str) -> Events:
        """What comes of a line.

        Errors: `ConfigError` for a command that is unknown or cannot be done, `AdapterError`, and
        those of an answer. The turns are as before then.
        """
        text = line.strip()
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the message is not UTF-8", "use a terminal or a file in UTF-8")
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            command = self._command(name)
            if rest.strip() and f"/{name}" in HELP:
                raise ConfigError(
                    f"/{name} takes nothing, and {excerpt(rest.strip())!r} follows it",
                    "//text is a message that begins with a slash",
                )
            yield from command(rest.strip())
        elif text:
            adapter = self.conversation.adapter
            yield from self.conversation.answer(text.removeprefix("/"), [adapter])

    def _command(self, name: str) -> Callable[[str], Events]:
        if name in self._commands:
            return self._commands[name]
        near = difflib.get_close_matches(name.lower(), self._commands, n=1)
        guess = f", did you mean /{near[0]}?" if near else ""
        raise ConfigError(
            f"unknown command /{excerpt(name)}{guess}",
            "/help lists them, and //text is a message that begins with a slash",
        )

    def _use(self, name: str) -> Events:
        if name == BASE:
            yield from self._base("")
            return
        known = self.conversation.by.bank.names
        if name not in known:
            raise AdapterError(
                f"no adapter is called {excerpt(name)!r}",
                f"name one of {', '.join([*known, BASE])}",
            )
        self._switch(name)
        self._compared = name
        yield Note(f"{name} answers from here on")

    def _base(self, rest: str) -> Events:
        self._switch(None)
        yield Note("the base answers from here on, without an adapter")

    def _switch(self, adapter: str | None) -> None:
        check_system(self.conversation.by.formats[adapter], self.conversation.system)
        self.conversation.adapter = adapter

    def _compare(self, message: str) -> Events:
        """The turn has the answer of the one in use, or stays as it was where none comes."""
        talk = self.conversation
        other = self._compared or next(iter(talk.by.bank.names), None)
        if other is None:
            raise ConfigError("there is no adapter to compare the base with", "give --adapter DIR")
        before = list(talk.turns)
        if not message and not before:
            raise ConfigError("there is no message to compare answers to", "give /compare TEXT")
        message = message or talk.turns.pop().message
        try:
            yield from talk.answer(message, [None, other])
        finally:
            if len(talk.turns) < len(before):
                talk.turns = before

    def _adapters(self, rest: str) -> Events:
        bank = self.conversation.by.bank
        if not bank.names:
            yield Note("there are no adapters: the base answers")
        for name in bank.names:
            used = ", in use" if name == self.conversation.adapter else ""
            yield Note(f"{name}  {size_text(bank.nbytes(name))}{used}")

    def _system(self, text: str) -> Events:
        talk = self.conversation
        if talk.by.plain:
            raise ConfigError("a plain chat has no place for a system's text", "leave --plain out")
        check_system(talk.by.formats[talk.adapter], text)
        talk.system = text or None
        yield Note("the system says this from here on" if text else "the system says nothing")

    def _reset(self, rest: str) -> Events:
        self.conversation.reset()
        yield Note("all turns are forgotten")

    def _help(self, rest: str) -> Events:
        width = max(map(len, HELP))
        for command, what in HELP.items():
            yield Note(f"{command:<{width}}  {what}")
        yield Note("all else is a message; a line that ends with \\ goes on in the next one")
        yield Note("^C stops an answer, of which is kept what has come; once more leaves")

    def _quit(self, rest: str) -> Events:
        yield Left()


def begin(named: Named, adapter: str | None) -> Lines:
    """The chat that the options ask for, `adapter` answering at first.

    Errors: `ConfigError` for a chat template that is missing or leaves out what the system says,
    those of the base and the adapters.
    """
    parsed = named.parsed
    options, drawn = parsed[ChatConfig], parsed[SamplingConfig]
    opened = AdaptedBase.open(named)
    written = opened.formats[adapter]
    if not options.plain:
        if not written.tokenizer.chat_template:
            raise ConfigError(
                f"{opened.base.source.name} has no chat template",
                "give --plain, for prompts without one, or an adapter that was trained with "
                "--chat_template",
            )
        check_system(written, options.system)
    model = opened.load()
    engine = Engine(model, pad_id=padding_id(written.tokenizer), bank=opened.bank)
    answering = Answering(
        *(opened.bank, engine, opened.formats),
        sampling=Sampling.of(drawn),
        max_new_tokens=drawn.max_new_tokens,
        stops=drawn.stops,
        plain=options.plain,
    )
    how = "a chat without --plain answers" if options.plain else "--plain answers"
    note = form_note(opened.adapters, how, plain=options.plain)
    return Lines(Conversation(answering, adapter, options.system), note)

"""The names that requests may give as their model: the base, and each adapter on it.

A name says which adapter computes, and how a prompt becomes tokens: an adapter brings the chat
template, the day, the variables and the ends of the run that made it. Templates and tokenizers run
in one thread of their own: a tokenizer is put into another state for each text, so that two threads
may not share it, and the model's thread has another copy to make text of tokens with.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

from qlora_kit.config.generation import BASE
from qlora_kit.config.lora import ADAPTER_NAMES, is_model_name
from qlora_kit.data.answers import chat_ids, unwritten
from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.fields import Fields
from qlora_kit.data.turns import check_order, messages_of
from qlora_kit.errors import ConfigError, InputError, QloraKitError, excerpt
from qlora_kit.serving.errors import from_error, invalid, no_model, taken

Prompt: TypeAlias = "str | Sequence[dict[str, Any]] | Sequence[int]"
"""A text, the messages of a chat, or tokens; a sequence is not empty."""


class Format(Protocol):
    """How prompts of a model are written, and where its answers end."""

    @property
    def tokenizer(self) -> Any:
        """With the model's chat template."""

    @property
    def chat(self) -> ChatOptions:
        """What the template is told beside the messages."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""

    def prompt_ids(self, prompt: str, *, limit: int | None = None) -> list[int]:
        """The ids to go on from; of more than `limit` perhaps not all."""


@dataclass(frozen=True)
class Model:
    """One name of the API's models."""

    name: str
    adapter: str | None
    """the bank's name of the adapter; None: the base alone"""
    format: Format
    is_plain: bool = False
    """whether it was trained on text that no chat template wrote"""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def described(self) -> dict[str, Any]:
        """The API's object; `form` says how an adapter is known to be asked best."""
        form = {"form": "text"} if self.is_plain else {}
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "local"}
        return {**about, **form}

    def read(self, prompt: Prompt, limit: int) -> tuple[list[int], frozenset[int]]:
        """The tokens of a prompt, and those that end its answer.

        A prompt is a plain text, the messages of a chat, or tokens; of more tokens than `limit`
        perhaps not all are given.
        Errors: `ApiError`, `QloraKitError`.
        """
        if isinstance(prompt, str):
            ids = self.format.prompt_ids(prompt, limit=limit)
        elif isinstance(prompt[0], dict):
            ids = self._read_chat(cast(Sequence[dict[str, Any]], prompt), limit)
        else:
            ids = list(cast(Sequence[int], prompt))
        # A template is asked for these, too, at the first time.
        return ids, self.format.ends

    def _read_chat(self, messages: Sequence[dict[str, Any]], limit: int) -> list[int]:
        """The tokens before the answer to some messages, as training puts them there.

        Errors: `ApiError` for a tokenizer without a template and for what the template would leave
        out of the messages without a word; `QloraKitError` of the messages and the template.
        """
        tokenizer, options = self.format.tokenizer, self.format.chat
        if not tokenizer.chat_template:
            raise invalid("this model has no chat template; use /v1/completions", "messages")
        turns = messages_of(Fields({"messages": list(messages)}, "request"), "messages")
        check_order(turns, "request: messages")
        if parts := unwritten(turns, tokenizer, options):
            raise invalid(
                f"the model's chat template leaves out {parts}; say it in a user's message",
                "messages",
            )
        return chat_ids(turns, tokenizer, options, limit=limit)


class Models:
    """The names, in the order in which they came; the base is first."""

    def __init__(self, base: Model) -> None:
        self._base, self._models = base, {base.name: base}
        self._changing = threading.Lock()
        self._reading = _Worker("tokens")
        self._adding = _Worker("adapters")
        self.for_text = copy.deepcopy(base.format.tokenizer)
        """the copy of the tokenizer that tokens become text with"""

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(self._models)

    def all(self) -> list[Model]:
        """All of them."""
        return list(self._models.values())

    def get(self, name: str) -> Model:
        """The one of that name; the base is also `base`. Errors: `ApiError`."""
        found = self._base if name == BASE else self._models.get(name)
        if found is None:
            raise no_model(name, self.names)
        return found

    async def read(
        self, model: Model, prompt: Prompt, limit: int
    ) -> tuple[list[int], frozenset[int]]:
        """`model.read`, in the thread of the tokenizer; left out where it is cancelled before.

        Errors: `ApiError` for what the prompt does wrong.
        """
        try:
            found = await self._reading.do(lambda: model.read(prompt, limit))
            return cast(tuple[list[int], frozenset[int]], found)
        except QloraKitError as error:
            answer = from_error(error)
            if answer.status >= 500:
                raise  # for the log
            raise answer from error

    async def add(self, name: str, path: str, opened: Callable[[str, str], Model]) -> Model:
        """A new name for the adapter in a directory, which `opened` puts into the bank.

        That reads files, in a thread of its own, one adapter at a time. Errors: `ApiError`.
        """

        def added() -> Model:
            if name in self._models or name == BASE:
                raise taken(name, "is the name of a model that is here")
            if not is_model_name(name):
                raise invalid(f"the name of an adapter is {ADAPTER_NAMES}", "name")
            model = opened(name, path)
            self.put(model)
            return model

        try:
            return cast(Model, await self._adding.do(added))
        except (InputError, ConfigError) as error:
            raise invalid(excerpt(str(error), 400), "path") from error
        except OSError as error:  # a path that the system does not take
            raise invalid(f"path: {error.strerror or type(error).__name__}", "path") from error

    def put(self, model: Model) -> None:
        """Let a model be asked for."""
        self._change(lambda models: {**models, model.name: model})

    def forget(self, name: str) -> None:
        """Take a name out; requests for it find it no more."""
        self._change(lambda models: {one: each for one, each in models.items() if one != name})

    def _change(self, changed: Callable[[dict[str, Model]], dict[str, Model]]) -> None:
        with self._changing:
            self._models = changed(self._models)

    def later(self, remove: Callable[[str], None], adapter: str) -> None:
        """Take an adapter out of the bank, behind those that are being added.

        The bank changes in one thread at a time: the model's would wait for the files of another.
        """
        self._adding.submit(lambda: remove(adapter))

    def close(self) -> None:
        """Let the threads end."""
        self._reading.close()
        self._adding.close()


class _Worker:
    """A thread that does one thing after another, and keeps no process from ending.

    Those of a `ThreadPoolExecutor` are waited for when Python ends, however long their work is.
    """

    def __init__(self, name: str) -> None:
        self._tasks = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Have something done; what is cancelled before its turn is left out."""
        future = Future[Any]()
        self._tasks.put((future, work))
        return future

    async def do(self, work: Callable[[], Any]) -> Any:
        """What something gives, once it is done. Errors: its own."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Leave out what waits, and let the thread end behind what it does now."""
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task[0].cancel()
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # an answer's tokens, until the next one comes

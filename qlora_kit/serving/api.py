"""The paths of the server: the OpenAI API's, those of adapters, and the page.

A request is read, checked and made tokens of here; the scheduler's thread computes, and what it
hands on is sent as it comes, or as one object. A client that leaves frees its place at once.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qlora_kit.config.commands import ServeConfig
from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.generation.request import Request as EngineRequest
from qlora_kit.generation.sampling import Sampling
from qlora_kit.serving.answer import Answer, Job
from qlora_kit.serving.errors import (
    ApiError,
    closing,
    from_error,
    invalid,
    left,
    no_adapters,
    no_model,
    no_path,
    taken,
)
from qlora_kit.serving.guard import disconnected, read_body
from qlora_kit.serving.models import Model, Models, Prompt
from qlora_kit.serving.reply import Reply
from qlora_kit.serving.scheduler import FAILURES, Scheduler
from qlora_kit.serving.schemas import AdapterRequest, Asked, ChatRequest, CompletionRequest, read

PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: nothing that is not this server's own."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_length: int
    """tokens of a prompt and its answer"""
    max_new_tokens: int

    @staticmethod
    def of(context: int, options: ServeConfig) -> Limits:
        """Those that options set, for a model with such a context. Errors: `ConfigError`."""
        if options.max_length is not None and options.max_length > context:
            raise ConfigError(
                f"max_length {options.max_length} is beyond the model's context of {context}",
                f"give at most {context}",
            )
        return Limits(options.max_length or context, options.max_new_tokens)

    def of_answer(self, asked: Asked, prompt: int) -> int:
        """The most tokens of the answer to a prompt of so many. Errors: `ApiError`."""
        most, name = asked.most_tokens, asked.most_field
        room = self.max_length - prompt
        if room < 1 or (most is not None and most > room):
            # Of a longer prompt perhaps not all has been read.
            count = f"{prompt}" if room >= 0 else f"more than {self.max_length}"
            more = f" and {name} {most}" if most is not None else ""
            raise invalid(
                f"the prompt has {count} tokens{more}, and both together may be {self.max_length}",
                asked.prompt_field if room < 1 else name,
                "context_length_exceeded",
            )
        if most is not None and most > self.max_new_tokens:
            raise invalid(
                f"{name} is {most}, and this server writes at most {self.max_new_tokens}", name
            )
        return min(most or asked.usual_tokens or self.max_new_tokens, self.max_new_tokens, room)

    @property
    def body_bytes(self) -> int:
        """Of a body: text that fills the length, escaped, and more."""
        return max(2**20, 32 * self.max_length)


@dataclass(frozen=True)
class Api:
    """What the paths answer from.

    `add_adapter` opens a directory under a name, adds it to the bank, and gives its model; None
    where adapters may not be added. `remove_adapter` takes one out of the bank.
    """

    models: Models
    scheduler: Scheduler
    limits: Limits
    vocabulary: int
    """how many tokens the model has"""
    add_adapter: Callable[[str, str], Model] | None
    remove_adapter: Callable[[str], None]

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        get, post = ["GET", "HEAD"], ["POST"]
        app.add_api_route("/health", self._health, methods=get, response_model=None)
        app.add_api_route("/v1/models", self._models, methods=get)
        app.add_api_route("/v1/models/{name:path}", self._model, methods=get)
        app.add_api_route("/v1/chat/completions", self._chat, methods=post, response_model=None)
        app.add_api_route("/v1/completions", self._completion, methods=post, response_model=None)
        app.add_api_route("/v1/adapters", self._add, methods=post)
        app.add_api_route("/v1/adapters/{name}", self._remove, methods=["DELETE"])
        for path in PAGE:
            app.add_api_route(path, self._page, methods=get, response_model=None)
        for kind in (ApiError, HTTPException, Exception):
            app.add_exception_handler(kind, _error)
        return app

    async def _health(self) -> Response:
        running, waiting = self.scheduler.counts
        is_failing = self.scheduler.failures >= FAILURES or self.scheduler.has_ended
        status = "closing" if self.scheduler.is_closing else "failing" if is_failing else "ok"
        content = {"status": status, "running": running, "waiting": waiting}
        return JSONResponse(content, 503 if is_failing else 200)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [model.described for model in self.models.all()]}

    async def _model(self, name: str) -> dict[str, Any]:
        return self.models.get(name).described

    async def _page(self, request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        content = await asyncio.to_thread(_content, name)
        return Response(content, headers={"content-type": kind, "content-security-policy": POLICY})

    async def _chat(self, request: Request) -> Response:
        asked = read(ChatRequest, await self._body(request))
        model = self.models.get(asked.model)
        messages = [_plain(message.model_dump(exclude_none=True)) for message in asked.messages]
        return await self._answer(request, asked, model, messages, is_chat=True)

    async def _completion(self, request: Request) -> Response:
        asked = read(CompletionRequest, await self._body(request))
        model, prompt = self.models.get(asked.model), asked.text_or_ids
        if prompt == []:
            raise invalid("the prompt has no tokens", "prompt")
        return await self._answer(request, asked, model, prompt, is_chat=False)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.receive, request.headers, self.limits.body_bytes)

    async def _answer(
        self, request: Request, asked: Asked, model: Model, prompt: Prompt, *, is_chat: bool
    ) -> Response:
        """The answer to a prompt, which waits from here on for its place. Errors: `ApiError`."""
        with self.scheduler.place():
            ids, ends = await self._read(request, model, prompt)
            if self.models.get(asked.model) is not model:  # by now another one has the name
                raise no_model(asked.model, self.models.names)
            self._check_ids(ids, asked.prompt_field)
            most = self.limits.of_answer(asked, len(ids))
            wanted = EngineRequest(ids, most, ends, sampling(asked), model.adapter)
            job = Job(wanted, self.models.for_text, asked.stops)
            self.scheduler.submit(job)
        answer = Answer(job, model.name, is_chat, asked.with_usage)
        said = request.scope["said"]
        return Reply(answer, self.scheduler, streams=bool(asked.stream), log=said.append)

    async def _read(
        self, request: Request, model: Model, prompt: Prompt
    ) -> tuple[list[int], frozenset[int]]:
        """The tokens of a prompt and the ends of its answer, while the client and the server stay.

        Errors: `ApiError`.
        """
        reading = asyncio.ensure_future(self.models.read(model, prompt, self.limits.max_length))
        leaving = asyncio.ensure_future(disconnected(request.receive))
        ending = asyncio.ensure_future(self.scheduler.closes.wait())
        tasks: tuple[asyncio.Future[Any], ...] = (reading, leaving, ending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise left() if leaving.done() else closing()
        finally:
            for task in tasks:
                task.cancel()

    def _check_ids(self, ids: list[int], param: str) -> None:
        """Refuse what is no prompt before anything is sent. Errors: `ApiError`."""
        if not ids:
            raise invalid("the prompt has no tokens", param)
        known = range(self.vocabulary)
        wrong = next((token for token in (min(ids), max(ids)) if token not in known), None)
        if wrong is not None:
            message = f"the prompt has the token {excerpt(str(wrong))}"
            raise invalid(f"{message}, but the model has {self.vocabulary} tokens", param)

    async def _add(self, request: Request) -> dict[str, Any]:
        if self.add_adapter is None:
            raise no_adapters()
        asked = read(AdapterRequest, await self._body(request))
        if self.scheduler.is_retiring(asked.name):
            raise taken(asked.name, "is still removed: its last requests have not ended")
        return (await self.models.add(asked.name, asked.path, self.add_adapter)).described

    async def _remove(self, name: str) -> dict[str, Any]:
        if self.add_adapter is None:
            raise no_adapters()
        model = self.models.get(name)
        if model.adapter is None:
            raise invalid(f"{name} is the base, which stays", "name")
        adapter = model.adapter
        self.models.forget(name)
        self.scheduler.retire(adapter, lambda: self.models.later(self.remove_adapter, adapter))
        return {"id": name, "object": "model", "deleted": True}


def sampling(asked: Asked) -> Sampling:
    """How tokens are drawn: as the API has it where nothing is said. Errors: `ApiError`."""
    chosen: dict[str, Any] = {
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": asked.top_p or None,
        "top_k": asked.top_k,
        "repetition_penalty": asked.repetition_penalty,
        # Without a seed every answer is another one.
        "seed": secrets.randbits(62) if asked.seed is None else asked.seed % 2**63,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    for name, value in given.items():
        try:
            Sampling(**{name: value})
        except ConfigError as error:
            raise invalid(excerpt(error.problem, 400), name) from error
    if asked.top_p == 0:  # no share at all: the likeliest token is always drawn from
        given["temperature"] = 0.0
    return Sampling(**given)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as rows of data have it, without what has no value; a text may be empty."""
    return {name: value for name, value in message.items() if value not in (None, [], {})}


@functools.cache
def _content(name: str) -> bytes:
    path = Path(__file__).with_name(name)
    if not path.is_file():
        raise no_path()
    return path.read_bytes()


def _error(request: Request, error: Exception) -> Response:
    """An error of the API, or of the library that calls it, as its object."""
    if isinstance(error, HTTPException):
        error = no_path() if error.status_code in (404, 405) else invalid("bad request")
    if not isinstance(error, ApiError):
        error = from_error(error)  # and raised again: the guard has it logged
    return JSONResponse(error.body, error.status, error.headers)

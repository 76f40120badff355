"""A request on its way through the model, and its answer in the objects of the API.

An answer is one object, or the chunks of a stream.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_kit.generation.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DONE = b"data: [DONE]\n\n"
"""What ends a stream."""


@dataclass(frozen=True)
class Event:
    """What a job has come to: more text, and perhaps its end."""

    text: str = ""
    finish: str | None = None
    """the API's reason: `stop` at an end token or a stop string, `length` at the limit"""
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """One answer that is asked for, made in the event loop that waits for its events."""

    request: Request
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...] = ()
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    tokens: int = 0
    """tokens that were drawn"""
    left: bool = False
    """whether nobody waits for it any more"""
    asked_s: float = field(default_factory=time.monotonic)
    began_s: float | None = None
    """when it got its place in the batch"""


@dataclass(frozen=True)
class Answer:
    """The answer to one request, a chat's or a plain prompt's."""

    job: Job
    model: str
    is_chat: bool
    with_usage: bool = False
    """whether a stream says its counts"""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> dict[str, int]:
        """The counts of the prompt and of what was drawn so far."""
        prompt, drawn = len(self.job.request.ids), self.job.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
        }

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        if self.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message}
        else:
            choice = {"index": 0, "text": text}
        choice |= {"logprobs": None, "finish_reason": finish}
        return {**self._head(""), "choices": [choice], "usage": self.usage}

    def first(self) -> bytes:
        """What a stream begins with: whose turn it is; nothing for a plain prompt."""
        if not self.is_chat:
            return b""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str) -> bytes:
        """The chunk of some more text."""
        return self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text}, None)

    def last(self, finish: str) -> bytes:
        """The chunks that end a stream."""
        end = self._chunk({"delta": {}} if self.is_chat else {"text": ""}, finish)
        if self.with_usage:
            end += _event({**self._head(".chunk"), "choices": [], "usage": self.usage})
        return end + DONE

    def _chunk(self, said: dict[str, Any], finish: str | None) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.with_usage else {}
        return _event({**self._head(".chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        if self.is_chat:
            name, id = f"chat.completion{kind}", f"chatcmpl-{self.id}"
        else:
            name, id = "text_completion", f"cmpl-{self.id}"
        return {"id": id, "object": name, "created": self.created, "model": self.model}


def failed(error: dict[str, Any]) -> bytes:
    """The end of a stream that fails on its way."""
    return _event(error) + DONE


def _event(content: dict[str, Any]) -> bytes:
    # ASCII, so that no character in it ends a line.
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"

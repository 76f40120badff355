"""The response that waits for an answer: sent as it comes, or as one object at its end.

It listens at the same time whether the client is still there; one that has left takes its job with
it, whether it was to be streamed or not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Response

from qlora_kit.serving.answer import Answer, Event, failed
from qlora_kit.serving.errors import LEFT, ApiError, from_error, left
from qlora_kit.serving.guard import disconnected, send_json
from qlora_kit.serving.scheduler import Scheduler

STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # Proxies that collect a response would hold the pieces back.
    (b"x-accel-buffering", b"no"),
]


class Reply(Response):
    """The response to one job, which waits in the scheduler already."""

    def __init__(
        self, answer: Answer, scheduler: Scheduler, *, streams: bool, log: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._answer, self._scheduler = answer, scheduler
        self._streams, self._log = streams, log
        self._finish = "left"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        watch = asyncio.create_task(self._leave_with(receive))
        try:
            await (self._stream(send) if self._streams else self._whole(send))
        finally:
            watch.cancel()
            self._scheduler.cancel(self._answer.job)
            self._log(self._said())

    async def _leave_with(self, receive: Any) -> None:
        """End the job with its client."""
        await disconnected(receive)
        job = self._answer.job
        self._scheduler.cancel(job)
        job.events.put_nowait(Event(error=left()))

    async def _events(self) -> AsyncIterator[Event]:
        """The events of the job; what came while others were sent is one."""
        queue = self._answer.job.events
        while True:
            event = await queue.get()
            text = event.text
            while not (event.is_last or queue.empty()):
                event = queue.get_nowait()
                text += event.text
            yield Event(text, event.finish, event.error)
            if event.is_last:
                return

    async def _whole(self, send: Any) -> None:
        text = ""
        async for event in self._events():
            text += event.text
            if event.error is not None:
                self._fail(event.error)
                raise event.error
            if event.finish is not None:
                self._finish = event.finish
        await send_json(send, self._answer.whole(text, self._finish))

    async def _stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        # At once, also where the answer still waits for its place.
        first = self._answer.first()
        await send({"type": "http.response.body", "body": first, "more_body": True})
        content = b""
        async for event in self._events():
            if event.text:
                content += self._answer.piece(event.text)
            if event.finish is not None:
                self._finish = event.finish
                content += self._answer.last(event.finish)
            if event.error is not None:
                self._fail(event.error)
                content += failed(from_error(event.error).body)
            body = {"type": "http.response.body", "body": content, "more_body": not event.is_last}
            await send(body)
            content = b""

    def _fail(self, error: Exception) -> None:
        is_gone = isinstance(error, ApiError) and error.status == LEFT
        self._finish = "left" if is_gone else "failed"

    def _said(self) -> str:
        """What the log says of an answer: no word of it."""
        job = self._answer.job
        took = time.monotonic() - (job.began_s or time.monotonic())
        rate = f", {job.tokens / took:.1f} tokens/s" if took > 0 else ""
        waited = f", waited {(job.began_s or time.monotonic()) - job.asked_s:.2f} s"
        counts = f"{len(job.request.ids)}+{job.tokens} tokens{rate}{waited}"
        return f"{self._answer.model} {counts}, {self._finish}"

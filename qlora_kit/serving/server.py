"""The server: a socket, connections with limits on their number and patience, and its end.

uvicorn speaks HTTP. What it leaves out stands here: a connection that sends no whole header within
some seconds is closed, and before that where the most are open and another one comes; what is no
HTTP is told so in the API's words. Signals are the command's: the server asks whether it is to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_kit.serving.errors import BROKEN, ApiError, invalid
from qlora_kit.serving.guard import App
from qlora_kit.serving.scheduler import Scheduler

HEADERS_S = 20.0
"""How long a connection may take to send the head of a request, and to begin with another one."""
GRACE_S = 5.0
"""How long running answers go on after the server was asked to end."""
SPARE_CONNECTIONS = 128
"""Connections beside those of requests that run or wait."""


def run(
    app: App,
    listener: socket.socket,
    scheduler: Scheduler,
    *,
    is_asked_to_end: Callable[[], bool],
    on_start: Callable[[], None] = lambda: None,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until that is asked for; running answers have `grace_s` seconds to end."""
    most = scheduler.max_batch + scheduler.max_queue + SPARE_CONNECTIONS

    class Connection(_Connection):
        most_connections = most

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(HEADERS_S),
        timeout_graceful_shutdown=int(grace_s) + 2,
    )
    server = _Server(config, scheduler, is_asked_to_end, on_start, grace_s)
    try:
        asyncio.run(server.serve([listener]))
    finally:
        scheduler.close(0)
        scheduler.join(grace_s)


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Scheduler,
        is_asked_to_end: Callable[[], bool],
        on_start: Callable[[], None],
        grace_s: float,
    ) -> None:
        super().__init__(config)
        self._scheduler, self._is_asked_to_end = scheduler, is_asked_to_end
        self._on_start, self._grace_s = on_start, grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.start(asyncio.get_running_loop())
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if self._scheduler.has_ended:
            return True
        return await super().on_tick(counter) or self._is_asked_to_end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.close(self._grace_s)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    most_connections: int
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections and not self._close_oldest():
            self._refuse(ApiError(503, "too many connections are open", type=BROKEN))
        else:
            self._wait_for_head()

    def _close_oldest(self) -> bool:
        """Close the connection that has waited longest for the head of a request, if any has."""
        idle = {
            one: one._patience.when()
            for one in self.connections
            if isinstance(one, _Connection) and one._patience is not None
        }
        if idle:
            oldest = min(idle, key=lambda one: idle[one])
            oldest._stop_waiting()
            oldest.transport.close()
        return bool(idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.transport.is_closing() or self._is_answering():
            self._stop_waiting()
        else:
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # A body that nobody reads is let arrive, so that the client reads its answer, for a while.
        if not self.transport.is_closing() and not self._is_answering():
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(invalid("this is no HTTP request that can be read", code="bad_http"))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _refuse(self, error: ApiError) -> None:
        """Answer what was never a request, and close."""
        content = json.dumps(error.body).encode()
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + content)
        self.transport.close()

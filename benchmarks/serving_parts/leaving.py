"""Clients that hang up at every moment of a request: their places are free again."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from serving_parts.server import Client, Server, plug, request_bytes

LONG_TOKENS = 400
TRIES = 40
"""Answers that are looked through for a long one: an adapter may end any of them."""
AT_ONCE = 12
CONTROL, CONTROLS = "<|end|>", 100_000
LIMIT_S = 20
STEADY_S = 0.3
"""How long nothing has to run: a request may lie unread in the server's socket."""


def long_answer(watcher: Client, models: list[str], prompt: str) -> tuple[dict[str, Any], int]:
    """A request whose answer is long, and its tokens."""
    found: tuple[dict[str, Any], int] = {}, 0
    for seed in range(TRIES):
        drawn = {"max_tokens": LONG_TOKENS, "temperature": 1.0, "seed": seed}
        asked = {"model": models[seed % len(models)], "prompt": prompt, **drawn}
        tokens = watcher.ask("POST", "/v1/completions", asked)[1]["usage"]["completion_tokens"]
        if tokens > found[1]:
            found = asked, tokens
        if tokens == LONG_TOKENS:
            break
    return found


def sent(connection: socket.socket, asked: dict[str, Any], *, stream: bool, less: int = 0) -> None:
    """Send the request, without so many of its last bytes."""
    body = json.dumps({**asked, "stream": stream}).encode()
    whole = request_bytes("POST", "/v1/completions", body)
    connection.sendall(whole[: len(whole) - less])


def reset(connection: socket.socket) -> None:
    """End a connection without a word: what the other side sends is answered by a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_some(connection: socket.socket, events: int) -> None:
    """Read so many events of a stream."""
    seen = b""
    while seen.count(b"data:") < events:
        seen += connection.recv(4096)


Left = Callable[[socket.socket, dict[str, Any]], None]


def before_the_request(connection: socket.socket, asked: dict[str, Any]) -> None:
    connection.close()


def within_the_headers(connection: socket.socket, asked: dict[str, Any]) -> None:
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127")
    connection.close()


def within_the_body(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=True, less=20)
    connection.close()


def while_the_prompt_is_read(connection: socket.socket, asked: dict[str, Any]) -> None:
    """A chat of control tokens, which cost the most to read, and more than the context holds."""
    messages = [{"role": "user", "content": CONTROL * CONTROLS}]
    body = json.dumps({"model": asked["model"], "messages": messages}).encode()
    connection.sendall(request_bytes("POST", "/v1/chat/completions", body))
    time.sleep(0.1)
    reset(connection)


def before_the_answer(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=False)
    connection.close()


def during_the_answer(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=False)
    time.sleep(0.1)
    reset(connection)


def before_the_stream(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=True)
    reset(connection)


def after_an_event(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=True)
    read_some(connection, 1)
    connection.close()


def after_some_events(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=True)
    read_some(connection, 5)
    reset(connection)


def without_reading(connection: socket.socket, asked: dict[str, Any]) -> None:
    sent(connection, asked, stream=True)
    time.sleep(0.2)
    connection.close()


MOMENTS: tuple[Left, ...] = (
    before_the_request,
    within_the_headers,
    within_the_body,
    while_the_prompt_is_read,
    before_the_answer,
    during_the_answer,
    before_the_stream,
    after_an_event,
    after_some_events,
    without_reading,
)


def hang_up(server: Server, models: list[str], prompt: str) -> dict[str, Any]:
    """Each moment alone and by more clients than have places; how soon no row runs any more."""
    watcher = Client(server.port)
    asked, tokens = long_answer(watcher, models, prompt)
    began = time.perf_counter()
    watcher.ask("POST", "/v1/completions", asked)
    alone_s = time.perf_counter() - began
    moments = {}
    for leave in MOMENTS:
        for clients in (1, AT_ONCE):
            for connection in [plug(server.port) for _ in range(clients)]:
                leave(connection, asked)
            idle_s = until_idle(watcher)
            moments[f"{leave.__name__}, {clients}"] = None if idle_s is None else round(idle_s, 3)
    waits = [idle_s for idle_s in moments.values() if idle_s is not None]
    return {
        "answer_alone": {"tokens": tokens, "seconds": round(alone_s, 3)},
        "seconds_until_no_row_runs": moments,
        "not_freed": len(moments) - len(waits),
        "slowest_s": max(waits),
    }


def until_idle(watcher: Client) -> float | None:
    """Seconds until no row runs and none waits, for some time; None where that takes too long."""
    began = since = time.monotonic()
    while (now := time.monotonic()) < began + LIMIT_S:
        said = watcher.get("/health")[1]
        if said["running"] or said["waiting"]:
            since = time.monotonic()
        elif now > since + STEADY_S:
            return since - began
        time.sleep(0.01)
    return None

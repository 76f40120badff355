"""What stands before every request: who may ask, how large a body may be, and what is logged.

A server without a key listens on loopback alone, but the browser on the same machine runs pages of
anybody. So it answers only requests that name a loopback host (a page whose own name was made to
point here names its own) and that come from no other origin. With a key, which a foreign page does
not have, neither is asked, so that a proxy may stand before the server. Bodies are JSON by their
content type, which no page can send elsewhere without being asked about first.

Nothing that a request says goes into the log as it stands, but the names of models that are here.

Sources: MDN, "Origin" and "Sec-Fetch-Site"; OWASP, "Cross-Site Request Forgery Prevention".
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from qlora_kit.config.commands import is_loopback
from qlora_kit.serving.errors import ApiError, from_error, left, too_large

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/page.js", "/page.css")
"""Paths that need no key: the page, where the key is typed, and whether the server is there."""
KEY_PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/adapters")
BODY_S = 30.0
"""How long a body may take to arrive."""
SEND_S = 60.0
"""How long a client may leave unread what is sent to it."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """The ASGI application around the one that answers."""

    def __init__(
        self,
        app: App,
        *,
        key: str | None,
        log: Callable[[str], None],
        report: Callable[[BaseException], None],
    ) -> None:
        self._app, self._key = app, None if key is None else key.encode()
        self._log, self._report = log, report

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} is served")
        began, status = time.monotonic(), 0
        said = scope["said"] = []

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            async with asyncio.timeout(SEND_S):
                await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, sends)
        except TimeoutError:
            raise  # the client reads nothing: its connection is closed
        except Exception as error:
            if not isinstance(error, ApiError):
                self._report(error)
            if not status:
                told = from_error(error)
                await send_json(sends, told.body, told.status, told.headers)
        finally:
            took = f"{time.monotonic() - began:.2f} s"
            self._log(" ".join([scope["method"][:8], _known(scope), str(status), took, *said]))

    def _check(self, scope: Message) -> None:
        """Refuse who may not ask. Errors: `ApiError`."""
        headers = dict(scope["headers"])
        if self._key is None:
            _check_browser(scope, headers)
        elif scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as the header Authorization: Bearer "
                    "KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(
                    415,
                    "send JSON, with the header Content-Type: application/json",
                    code="unsupported_media_type",
                )


def _check_browser(scope: Message, headers: dict[bytes, bytes]) -> None:
    """Refuse what a page of somebody else makes a browser send. Errors: `ApiError`."""
    host = headers.get(b"host", b"").decode("latin-1")
    if not is_loopback(_name(f"//{host}") or ""):
        raise ApiError(403, "the Host of the request is not this machine", code="wrong_host")
    origin = headers.get(b"origin")
    # A link to the page may stand on any other.
    is_page = scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS
    foreign = headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")
    if origin is not None and origin.decode("latin-1") not in (f"http://{host}", f"https://{host}"):
        foreign, is_page = True, False
    if foreign and not is_page:
        raise ApiError(403, "requests of pages of other origins are refused", code="wrong_origin")


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _known(scope: Message) -> str:
    """The path of a request, where it is one that the server has."""
    known = getattr(scope.get("route"), "path", None)
    if known is None and scope["path"] in (*OPEN_PATHS, *KEY_PATHS):
        known = scope["path"]  # refused before it was looked for
    return str(known or "an unknown path")


async def read_body(receive: Receive, headers: Any, limit: int) -> bytes:
    """All of a body. Errors: `ApiError` where it is too large, before all is read, or slow."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > limit:
        raise too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise left()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_large(limit)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_S:.0f} s",
            code="timeout",
            headers={"connection": "close"},
        ) from None


async def disconnected(receive: Receive) -> None:
    """Wait until the client of a request whose body was read has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(
    send: Send, said: Any, status: int = 200, more: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Send an object as JSON, with `more` headers."""
    content = json.dumps(said).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **more}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})

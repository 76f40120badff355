"""Requests of those who may not ask: without the key, or from somebody else's page.

A server without a key judges by Host and Origin instead.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving_parts.hostile import ADAPTERS, CHAT, Case, body
from serving_parts.server import KEY, request_bytes


def wrong_keys() -> Iterator[Case]:
    """Requests without the key."""
    given = ["", "Bearer", "Bearer ", "Bearer x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY]
    given += [f"Bearer {KEY.upper()}", f"Basic {KEY}", "Bearer " + "x" * 20_000, f"Bearer {KEY}, x"]
    given += ["Bearer \xff\xfe", f"Bearer {KEY} {KEY}"]
    for one in given:
        header = {"Authorization": one}
        yield Case("key", one[:30], request_bytes("POST", CHAT, body(CHAT), header))
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", ADAPTERS),
        ("DELETE", f"{ADAPTERS}/task0"),
    ):
        without = {"Authorization": ""}
        yield Case("key", f"{method} {path}", request_bytes(method, path, b"{}", without))


def of_others() -> Iterator[Case]:
    """To a server without a key: pages of somebody else, and names that are not this machine's."""
    hosts = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "10.0.0.1"]
    hosts += ["evil.example:8000", "127.0.0.1@evil.example", "0x7f.1.evil"]
    for host in hosts:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/")):
            data = body(CHAT) if method == "POST" else b""
            headers = {"Host": host, "Authorization": ""}
            yield Case(
                "host", f"{method} {path}, {host}", request_bytes(method, path, data, headers)
            )
    origins = [
        "http://evil.example",
        "null",
        "http://127.0.0.1.evil.example",
        "file://",
        "https://x",
    ]
    for origin in origins:
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", CHAT),
            ("DELETE", f"{ADAPTERS}/task0"),
        ):
            data = body(CHAT) if method == "POST" else b""
            headers = {"Origin": origin, "Authorization": ""}
            name = f"{method} {path}, {origin}"
            yield Case("origin", name, request_bytes(method, path, data, headers))
    other = {"Sec-Fetch-Site": "cross-site", "Authorization": ""}
    yield Case("origin", "cross-site", request_bytes("POST", CHAT, body(CHAT), other))
    without = {"Authorization": ""}
    yield Case("key", "an adapter", request_bytes("POST", ADAPTERS, body(ADAPTERS), without))
    yield Case("key", "no adapter", request_bytes("DELETE", f"{ADAPTERS}/task0", b"", without))

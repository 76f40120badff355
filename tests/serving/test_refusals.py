"""Requests that are refused: in the API's words, and the server is there afterwards."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from served import Served, refusal

from qlora_kit.serving import guard
from qlora_kit.serving import server as connections
from qlora_kit.serving.schemas import MOST_MESSAGES

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PLAIN = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
ROLES = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x/"}}]


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    # what is changed in a good body, the parameter that is named, a part of the message
    ({"model": "gpt-4"}, "model", "does not exist"),
    ({"model": ""}, "model", "at least 1"),
    ({"model": None}, "model", "valid string"),
    ({"messages": None}, "messages", "valid array"),
    ({"messages": []}, "messages", "at least 1"),
    (turns("Hi"), "messages.0", "object"),
    (turns({"content": "Hi"}), "messages.0.role", "required"),
    (turns({"role": "wizard", "content": "Hi"}), "messages.0.role", "user"),
    (turns({"role": "user", "content": IMAGE}), "messages.0.content.0.type", "text"),
    (turns({"role": "user", "content": 7}), "messages.0.content", "string"),
    (turns({"role": "user", "content": "Hi", "temprature": 1}), "messages.0.temprature", "unrec"),
    (turns(*ROLES), None, "before any user turn"),
    (turns(*[{"role": "user", "content": "Hi"}] * (MOST_MESSAGES + 1)), "messages", "at most"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "2"}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 10**30}, "max_tokens", ""),
    ({"max_tokens": 401}, "max_tokens", "at most 400"),
    ({"max_tokens": None, "max_completion_tokens": 401}, "max_completion_tokens", "at most 400"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": 1e-9}, "temperature", "at least 1e-06"),
    ({"top_p": 2}, "top_p", "at most 1"),
    ({"top_k": -1}, "top_k", "at least 0"),
    ({"repetition_penalty": 1e-9}, "repetition_penalty", "at least 0.01"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"max_completion_tokens": 3}, "max_tokens", "beside max_completion_tokens"),
    ({"seed": 0.5}, "seed", "integer"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"n": 2}, "n", "not supported"),
    ({"n": True}, "n", "not supported"),
    ({"logprobs": True}, "logprobs", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"temprature": 1}, "temprature", "did you mean temperature"),
]
HARMLESS = {
    "user": "me",
    "store": False,
    "metadata": {"a": "b"},
    "n": 1,
    "tools": [],
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "response_format": {"type": "text"},
    "stop": None,
    "seed": -1,
    "stream_options": None,
}


def is_up(server: Served) -> bool:
    with server.client() as client:
        answered = client.post("/v1/chat/completions", json=CHAT)
        return answered.status_code == 200 and client.get("/health").json()["running"] == 0


def test_what_a_body_asks_wrongly_is_named(server: Served) -> None:
    with server.client() as client:
        for change, param, part in REFUSED:
            response = client.post("/v1/chat/completions", json=CHAT | change)
            error = refusal(response, 404 if change == {"model": "gpt-4"} else 400)
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
            assert part in error["message"], (change, error)
        for prompt in (["a", "b"], [], [99999999], [-1], {"a": 1}, ["a", 1]):
            for stream in (False, True):  # which is not begun, either
                body = PLAIN | {"prompt": prompt, "stream": stream}
                refused = refusal(client.post("/v1/completions", json=body), 400)
                assert (refused["param"] or "").startswith("prompt"), refused
        assert client.post("/v1/chat/completions", json=CHAT | HARMLESS).status_code == 200
    assert is_up(server)


def test_what_does_not_fit_the_context_is_refused_with_its_code(server: Served) -> None:
    context = server.service.bank.base.context
    with server.client() as client:
        body = PLAIN | {"prompt": [5] * context}
        error = refusal(client.post("/v1/completions", json=body), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        body = PLAIN | {"prompt": [5] * (context - 1)}
        assert refusal(client.post("/v1/completions", json=body), 400)["param"] == "max_tokens"
        # What is not asked for gives way.
        for most in (1, None):
            response = client.post("/v1/completions", json=body | {"max_tokens": most})
            assert response.json()["usage"]["total_tokens"] <= context
        body = PLAIN | {"model": "noise", "max_tokens": None, "temperature": 0}
        counts = client.post("/v1/completions", json=body).json()["usage"]
        assert counts["completion_tokens"] == 16  # as the API has it


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"7",
    "NaN": json.dumps(CHAT | {"temperature": float("nan")}).encode(),
    "no UTF-8": b'{"model": "tiny\xff"}',
    "half a character": b'{"model": "\\ud800"}',
    "nested": b'{"model":' + b"[" * 100_000,
    "twice nested": b'{"messages":' + b'{"a":' * 50_000,
    "a long name": b'{"' + b"a" * 100_000 + b'": 1, "model": "tiny", "prompt": "a"}',
    "a long number": b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
}


def test_bodies_that_are_no_requests_are_refused(server: Served) -> None:
    with server.client() as client:
        for body in BODIES.values():
            for path in ("/v1/completions", "/v1/chat/completions"):
                headers = {"content-type": "application/json"}
                response = client.post(path, content=body, headers=headers)
                assert len(refusal(response, 400)["message"]) < 600
        refusal(client.post("/v1/completions", content=b"a=b"), 415)
        for path in (
            "/v1",
            "/v1/embeddings",
            "/docs",
            "/openapi.json",
            "/../page.py",
            "/v1/models/",
        ):
            refusal(client.get(path), 404)
        refusal(client.get("/v1/completions"), 404)
        refusal(client.delete("/v1/models"), 404)
    assert is_up(server)


def test_a_large_body_is_refused_before_it_has_arrived(server: Served) -> None:
    limit = 2**20
    with server.client() as client:
        body = PLAIN | {"prompt": "a" * limit}
        assert (
            refusal(client.post("/v1/completions", json=body), 413)["code"] == "request_too_large"
        )
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in said(server, head + b"Content-Length: 99999999999\r\n\r\n{")
    chunk = b"%x\r\n" % 65536 + b"a" * 65536 + b"\r\n"
    assert b" 413 " in said(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + 17 * chunk)
    assert is_up(server)


RAW = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 500 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    b"\r\n" * 50_000,
)


def said(server: Served, content: bytes, *, goes: bool = False) -> bytes:
    """What the server answers at once to some bytes, or to all of a client that then `goes`."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(content)
            if goes:
                connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def test_what_does_not_arrive_in_time_is_not_waited_for(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    monkeypatch.setattr(connections, "HEADERS_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 408 " in said(server, head + b"Content-Length: 9\r\n\r\n{")
    assert said(server, head) == said(server, b"") == b""  # closed, and never answered
    assert is_up(server)


def test_what_is_no_http_ends_a_connection_and_not_the_server(server: Served) -> None:
    for content in RAW:
        answer = said(server, content, goes=True)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), content[:40]
    assert is_up(server)


def test_no_page_of_another_origin_drives_a_server_without_a_key(server: Served) -> None:
    with server.client() as client:

        def status(**headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.post("/v1/chat/completions", json=CHAT, headers=named).status_code

        port = server.url.rpartition(":")[2]
        assert status() == 200
        assert status(origin=server.url, sec_fetch_site="same-origin") == 200
        assert status(host=f"localhost:{port}", origin=f"http://localhost:{port}") == 200
        # A name of somebody's that was made to point here.
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", ""):
            assert status(host=host) == 403, host
        # Pages elsewhere, on this machine too.
        for origin in (
            "http://evil.example",
            "null",
            f"http://localhost:{port}",
            "http://127.0.0.1",
        ):
            assert status(origin=origin) == 403, origin
        assert status(sec_fetch_site="cross-site") == status(sec_fetch_site="same-site") == 403
        assert client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        page = client.get("/", headers={"sec-fetch-site": "cross-site"})
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "access-control-allow-origin" not in client.options("/v1/models").headers


def test_adapters_are_not_changed_without_a_key(server: Served) -> None:
    with server.client() as client:
        body = {"name": "more", "path": "/etc"}
        refused = refusal(client.post("/v1/adapters", json=body), 403)
        assert refused["code"] == "needs_api_key"
        assert "QLORA_KIT_API_KEY" in refused["message"]
        assert refusal(client.delete("/v1/adapters/sql"), 403)["code"] == "needs_api_key"

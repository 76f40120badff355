"""`qlora-kit serve`: what is refused before anything is loaded, and how a signal ends it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from qlora_kit.redact import OWN_KEY

Run = Callable[..., Any]
KEY = "short-secret"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a refusal comes only after the model was opened."""
    monkeypatch.setitem(sys.modules, "qlora_kit.run.server", None)


@pytest.mark.usefixtures("no_torch")
def test_what_cannot_be_served_is_refused_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    def line(code: int, *arguments: object) -> str:
        answer = run("serve", *arguments)
        assert answer.code == code, answer.err
        assert KEY not in answer.err
        return str(answer.line)

    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "no API key is given" in line(2, "--host", host)
    assert "api_key must be 8 to 256" in line(2, "--api_key", f"{KEY} with a space")
    assert "api_key must be" in line(2, "--api_key", "")
    monkeypatch.setenv(OWN_KEY, "seven77")
    assert f"{OWN_KEY} must be 8 to 256" in line(2)
    monkeypatch.delenv(OWN_KEY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in line(4, "--port", port)
    assert "--host 192.0.2.1" in line(4, "--host", "192.0.2.1", "--api_key", KEY * 2)
    assert "no such directory" in line(3, "--model", "./not-here")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "fastapi" else find(n))
    assert line(2) == "error: not installed: fastapi; pip install 'qlora-kit[serve]'"


def test_limits_are_those_of_the_model(run: Run, free_port: int) -> None:
    answer = run("serve", "--max_length", "100000", "--port", free_port)
    assert (answer.code, "beyond the model's context" in answer.line) == (2, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_and_what_it_writes(
    run: Run, monkeypatch: pytest.MonkeyPatch, free_port: int, workshop: Any, number: int, code: int
) -> None:
    monkeypatch.setenv(OWN_KEY, KEY)
    found: list[str] = []

    def ask() -> None:
        """A stream that is still written when the signal comes."""
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{free_port}",
            headers={"authorization": f"Bearer {KEY}"},
            transport=httpx.HTTPTransport(retries=1000),
            timeout=60,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                client.get("/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        body = {"model": "llm", "prompt": "Hello", "max_tokens": 40, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            found.append(str(response.status_code))
            os.kill(os.getpid(), number)
            found.extend(response.iter_lines())

    thread = threading.Thread(target=ask)
    thread.start()
    given = ("--adapter", f"llm={workshop.adapter}", "--model", workshop.base)
    answer = run("serve", *given, "--port", free_port)
    thread.join(60)
    assert answer.code == code, answer.err
    assert f"serving base, llm at http://127.0.0.1:{free_port}/v1" in answer.out
    assert "ending: running answers have a few seconds" not in answer.line
    assert answer.line.startswith(f"error: stopped by {signal.Signals(number).name}: ")
    # Whole, for it is short: what runs has some seconds.
    assert found[0] == "200"
    assert found[-2:] == ["data: [DONE]", ""]
    assert json.loads(found[-4].removeprefix("data: "))["choices"][0]["finish_reason"]
    assert KEY not in answer.out + answer.err

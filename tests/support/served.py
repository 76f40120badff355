"""A server of ours in a thread, on a free port, with adapters that answer each otherwise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from trained import save_trained

from qlora_kit.base.source import TINY
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ServeConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.options.parsed import parse_values
from qlora_kit.run.named_base import Named
from qlora_kit.run.server import loaded_service
from qlora_kit.serving.listen import listening, url_of
from qlora_kit.serving.service import Service

HOW = {"bits": 16, "dtype": "fp32"}
"""As the base is held: in fp32 the rows of a batch do not change each other's last bits so far
that another token is the likeliest."""
GROUPS = (BaseConfig, AdaptersConfig, ServeConfig)
KEY = "a-key-of-this-test"
SPREADS = {"sql": 0.1, "qa": 0.2, "noise": 0.6, "broken": 1e37}


def save_adapters(directory: Path) -> dict[str, Path]:
    """Adapters of `tiny` of different ranks; `noise` never ends an answer by itself.

    What `broken` computes is beyond what floats hold.
    """
    found = {}
    for rank, (name, spread) in zip((2, 4, 8, 1), SPREADS.items(), strict=True):
        lora = LoRAConfig(r=rank, target_modules="all-linear" if rank > 2 else "auto")
        save_trained(TINY, directory / name, spread=spread, lora=lora, **HOW)
        found[name] = directory / name
    return found


@dataclass
class Served:
    """A server that runs, and what it has logged."""

    service: Service
    url: str
    log: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> httpx.Client:
        options.setdefault("headers", self.headers)
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            return client.get("/health").json()


@contextlib.contextmanager
def serving(
    adapters: dict[str, Path], *, key: str | None = None, grace_s: float = 5.0, **options: Any
) -> Iterator[Served]:
    """A server of `tiny` and some adapters, by options of `serve`, until the context is left.

    What is None is not given.
    """
    log: list[str] = []
    given = [f"{name}={directory}" for name, directory in adapters.items()] or None
    options = {**HOW, "adapter": given, "max_new_tokens": 400, **options}
    said = {name: value for name, value in options.items() if value is not None}
    parsed = parse_values({"model": "tiny", **said}, GROUPS)
    named = Named.open(parsed, parsed[AdaptersConfig].named)
    service = loaded_service(named, key, log.append)
    ended = threading.Event()
    listener = listening("127.0.0.1", 0)
    url = url_of(listener)
    thread = threading.Thread(
        target=service.run,
        args=(listener,),
        kwargs={"is_asked_to_end": ended.is_set, "grace_s": grace_s},
    )
    thread.start()
    try:
        yield Served(service, url, log, {"authorization": f"Bearer {key}"} if key else {})
    finally:
        ended.set()
        thread.join(30)
        assert not thread.is_alive()


def refusal(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert "/" not in error["message"].replace("/v1/", "").replace("application/json", "")
    return error

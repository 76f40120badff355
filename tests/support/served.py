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

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.base.source import TINY
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.serving.api import Limits
from qlora_kit.serving.listen import listening, url_of
from qlora_kit.serving.service import Service

HOW = {"bits": 16, "dtype": "fp32"}
"""As the base is held: in fp32 the rows of a batch do not change each other's last bits so far
that another token is the likeliest."""
SPREADS = {"sql": 0.1, "qa": 0.2, "noise": 0.6}


def save_adapters(directory: Path) -> dict[str, Path]:
    """Adapters of `tiny` of different ranks; `noise` never ends an answer by itself."""
    found = {}
    for rank, (name, spread) in zip((2, 4, 8), SPREADS.items(), strict=True):
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
    adapters: dict[str, Path],
    base: Base | None = None,
    *,
    key: str | None = None,
    max_batch: int = 8,
    max_queue: int = 64,
    limits: Limits | None = None,
    grace_s: float = 5.0,
) -> Iterator[Served]:
    """A server of `tiny` and some adapters, until the context is left."""
    base = base or load_base(str(TINY), **HOW)
    log: list[str] = []
    service = Service(
        base,
        limits or Limits(max_length=base.context, max_new_tokens=400),
        max_batch=max_batch,
        max_queue=max_queue,
        key=key,
        say=log.append,
        open_adapter=lambda name, path: service.add(name, read_adapter(path)),
    )
    for name, directory in adapters.items():
        service.models.put(service.add(name, read_adapter(directory)))
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

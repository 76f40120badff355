"""The real command `serve` in a process of its own, what it holds, and a plain client of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serving_parts.adapters import BASE_OPTIONS, ROOT

KEY = "a-key-of-this-benchmark"
START_S, STOP_S = 60, 20
IDLE_S = 5
"""How long a connection may be idle, of which a server closes those that are for longer."""


class Server:
    """A server on a free port of this machine, with a base, adapters and a key."""

    def __init__(
        self, folder: Path, adapters: Mapping[str, Path], *options: str, key: bool = True
    ) -> None:
        self._key = KEY if key else None
        self.log, self._counts = folder / "serve.log", folder / "counts.json"
        given = [f"--adapter={name}={path}" for name, path in adapters.items()]
        command = [sys.executable, "-m", "serving_parts.counted", str(self._counts), *BASE_OPTIONS]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *given, "--port", "0", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    **({"QLORA_KIT_API_KEY": KEY} if key else {}),
                },
                cwd=folder,
            )
        self.port = self._wait_for_port()

    def _wait_for_port(self) -> int:
        ends = time.monotonic() + START_S
        while time.monotonic() < ends and self.process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text()):
                with contextlib.suppress(OSError):
                    if Client(int(found[1])).get("/v1/models")[0] == 200:
                        return int(found[1])
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Ask the server to end; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_up(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def counted(self) -> dict[str, int]:
        """What the process says of itself: bytes of live tensors, objects, tasks (`counted.py`)."""
        self._counts.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGRTMIN)
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, ValueError):
                said: dict[str, int] = json.loads(self._counts.read_text())
                return said | {"resident_bytes": self._resident(), "descriptors": self._open()}
            time.sleep(0.02)
        raise RuntimeError("the server does not answer a signal")

    def _resident(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _open(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Client:
    """One connection to the server, kept open."""

    def __init__(self, port: int, *, key: str | None = KEY, timeout_s: float = 60) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._used_s = time.monotonic()

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a path."""
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a request; `body` is sent as JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        if time.monotonic() - self._used_s > IDLE_S:
            self.connection.close()  # opened again by the request
        self.connection.request(method, path, data, headers)
        response = self.connection.getresponse()
        said = response.read()
        self._used_s = time.monotonic()
        return response.status, json.loads(said) if said else None

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The objects of a streamed answer."""
        headers = {**self._headers, "Content-Type": "application/json"}
        data = json.dumps({**body, "stream": True}).encode()
        self.connection.request("POST", path, data, headers)
        response = self.connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()!r}")
        for line in response:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                yield json.loads(line[6:])

    def close(self) -> None:
        """Hang up."""
        self.connection.close()


def request_bytes(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """A request as it goes over the line; a header given as "" is left out."""
    fields = {
        "Host": "127.0.0.1",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def plug(port: int, timeout_s: float = 20) -> socket.socket:
    """A bare connection."""
    return socket.create_connection(("127.0.0.1", port), timeout_s)

"""Hostile requests sent, and their answers judged: refused in the API's words, and all well yet."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_parts.adapters import NEW_TOKENS
from serving_parts.hostile import Case
from serving_parts.server import Client, Server, plug

PATIENCE_S = 45
"""Longer than a server waits for a body."""
PAUSE_S = 0.01
"""Between two questions of somebody who looks on."""
EVERY = 20
"""Hostile requests between two good ones."""
BEFORE_THE_API = ("line", "header", "half", "path", "model", "method")
"""Kinds that a parser of HTTP may refuse in its own words."""
TELLTALES = re.compile(rb"Traceback|site-packages|\.py\b|/tmp/|/home/|/root/|Error\(")
"""What an answer must not have: parts of the program, or places on the disk."""


def judge(server: Server, cases: Sequence[Case], is_well: Callable[[], bool]) -> dict[str, Any]:
    """Send all; each kind's statuses and how long others wait, and what was not refused."""
    statuses: dict[str, Counter[str]] = {}
    faults = []
    quick = [case for case in cases if not case.slow]
    with ThreadPoolExecutor(8) as pool, Bystander(server.port) as bystander:
        slow = [(case, pool.submit(send, server.port, case)) for case in cases if case.slow]
        sent: list[tuple[Case, bytes]] = []
        for number, case in enumerate(quick):
            bystander.beside = case
            sent.append((case, send(server.port, case)))
            bystander.beside = None
            if number % EVERY == 0 and not (server.is_up and is_well()):
                faults.append(f"not well after {case.kind}, {case.name}")
        sent += [(case, answer.result()) for case, answer in slow]
    for case, answer in sent:
        status = answer[9:12].decode("latin-1") if answer else "closed"
        statuses.setdefault(case.kind, Counter())[status] += 1
        if wrong := fault(case, answer, status):
            faults.append(f"{case.kind}, {case.name}: {wrong}")
    if not (server.is_up and is_well()):
        faults.append("not well in the end")
    refused = sum(n for kind in statuses.values() for name, n in kind.items() if name[0] == "4")
    return {
        "requests": len(cases),
        "refused": refused,
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in statuses.items()},
        "slowest_health_s": bystander.slowest,
        "faults": faults,
    }


class Bystander:
    """Somebody who asks for the health of the server while hostile requests are sent."""

    def __init__(self, port: int) -> None:
        self.beside: Case | None = None
        """what is being sent; a wait counts for the case that it began beside or ended beside"""
        self._client = Client(port)
        self._waits: dict[str, tuple[float, str]] = {}
        self._thread, self._ended = threading.Thread(target=self._ask), threading.Event()

    @property
    def slowest(self) -> dict[str, Any]:
        """Of each kind the longest wait in seconds, and beside which case."""
        return {
            kind: {"seconds": round(wait_s, 3), "case": name}
            for kind, (wait_s, name) in sorted(self._waits.items())
        }

    def _ask(self) -> None:
        while not self._ended.wait(PAUSE_S):
            began, before = time.perf_counter(), self.beside
            self._client.get("/health")
            wait_s, case = time.perf_counter() - began, before or self.beside
            if case and wait_s > self._waits.get(case.kind, (0.0, ""))[0]:
                self._waits[case.kind] = wait_s, case.name

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()


def fault(case: Case, answer: bytes, status: str) -> str:
    """What is wrong with an answer to a hostile request; empty where nothing is."""
    if case.no_request and not answer:
        return ""
    if not status.startswith("4"):
        return f"{status}: {answer[-200:]!r}"
    head, _, said = answer.partition(b"\r\n\r\n")
    if TELLTALES.search(said):
        return f"says too much: {said[:200]!r}"
    if case.kind in BEFORE_THE_API and b"application/json" not in head.lower():
        return ""
    try:
        error = json.loads(said)["error"]
        return "" if error["message"] and {"type", "param", "code"} <= error.keys() else "no error"
    except (ValueError, KeyError, TypeError):
        return f"no error object: {said[:200]!r}"


def send(port: int, case: Case) -> bytes:
    """The answer to a case: all of its bytes, or none."""
    with plug(port, PATIENCE_S) as connection:
        # A server may answer, and close, before it has read everything.
        try:
            connection.sendall(case.data)
            if case.ends:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return receive(connection)


def receive(connection: socket.socket) -> bytes:
    """One answer; what came of it where the connection ends."""
    said = b""
    try:
        while piece := connection.recv(65536):
            said += piece
            head, ended, rest = said.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            if ended and length and len(rest) >= int(length[1]):
                break
    except (ConnectionResetError, TimeoutError):
        pass
    return said


def well(server: Server, answers: dict[str, str], prompt: str, models: Iterable[str]) -> bool:
    """Whether the server has its models yet, and each answers as ever."""
    client = Client(server.port)
    names = [one["id"] for one in client.get("/v1/models")[1]["data"]]
    good = set(models) <= set(names) and "another" not in names
    for model, expected in answers.items():
        asked = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        status, said = client.ask("POST", "/v1/completions", asked)
        good &= status == 200 and said["choices"][0]["text"] == expected
    client.close()
    return good

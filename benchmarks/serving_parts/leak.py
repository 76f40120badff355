"""Thousands of requests of every kind: does the server's process grow?"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving_parts.server import Client, Server

AT_ONCE = 8
EVERY = 100
"""Requests between two looks at the process."""
WARM_UP = 200
NAMES = ("resident_bytes", "tensor_bytes", "objects", "tasks", "threads", "descriptors")


def watch(
    server: Server, models: list[str], asked: list[str], requests: int, adapter: Path
) -> dict[str, Any]:
    """What the process holds after each hundred requests; slopes without the first two hundred.

    Between two looks `adapter` is added once more under another name, asked, and removed.
    """
    looks = [server.counted()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, requests, EVERY):
            shares = [range(first + n, first + EVERY, AT_ONCE) for n in range(AT_ONCE)]
            added = pool.submit(add_and_remove, server.port, adapter, asked[0])
            list(pool.map(lambda share: ask_all(server.port, models, asked, share), shares))
            added.result()
            looks.append(server.counted())
    kept = looks[WARM_UP // EVERY :]
    counts = range(WARM_UP, requests + 1, EVERY)
    slopes = {
        name: statistics.linear_regression(counts, [look[name] for look in kept]).slope
        for name in NAMES
    }
    return {
        "requests": requests,
        "warm_up": WARM_UP,
        "added_and_removed": requests // EVERY,
        "a_request": {name: round(slope, 4) for name, slope in slopes.items()},
        "first": {name: kept[0][name] for name in NAMES},
        "last": {name: kept[-1][name] for name in NAMES},
        "highest": {name: max(look[name] for look in kept) for name in NAMES},
        "resident_grown": round(kept[-1]["resident_bytes"] / kept[0]["resident_bytes"] - 1, 4),
        "resident_mib": [round(look["resident_bytes"] / 2**20, 1) for look in looks],
    }


def add_and_remove(port: int, adapter: Path, prompt: str) -> None:
    """An adapter more while others answer, and away again before its own answer has ended."""
    client = Client(port)
    added = {"name": "more", "path": str(adapter)}
    status = 409
    for _ in range(100):  # the one before may be in the batch yet
        if (status := client.ask("POST", "/v1/adapters", added)[0]) != 409:
            break
        time.sleep(0.05)
    assert status == 200
    limits = {"model": "more", "prompt": prompt, "max_tokens": 8}
    assert next(client.stream("/v1/completions", limits))
    other = Client(port)
    assert other.ask("DELETE", "/v1/adapters/more")[0] == 200
    assert other.ask("POST", "/v1/completions", limits)[0] == 404
    other.close()
    client.close()


def ask_all(port: int, models: list[str], asked: list[str], numbers: range) -> None:
    """Requests of every kind over a connection: answered, streamed, refused, and one hung up."""
    client = Client(port)
    for number in numbers:
        model, prompt = models[number % len(models)], asked[number % len(asked)]
        limits = {"model": model, "max_tokens": 4 + number % 8, "temperature": number % 2}
        chat = {**limits, "messages": [{"role": "user", "content": prompt}]}
        match number % 5:
            case 0:
                assert client.ask("POST", "/v1/chat/completions", chat)[0] == 200
            case 1:
                assert client.ask("POST", "/v1/completions", {**limits, "prompt": prompt})[0] == 200
            case 2:
                assert list(client.stream("/v1/chat/completions", chat))
            case 3:
                wrong = {**limits, "model": f"none-{number}", "prompt": prompt}
                assert client.ask("POST", "/v1/completions", wrong)[0] == 404
            case 4:
                next(client.stream("/v1/completions", {**limits, "prompt": prompt}))
                client.close()
                client = Client(port)
    client.close()

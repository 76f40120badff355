"""Thousands of requests of every kind: does the server's process grow?"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_parts.server import Client, Server

AT_ONCE = 8
EVERY = 100
"""Requests between two looks at the process."""
WARM_UP = 200


def watch(server: Server, models: list[str], asked: list[str], requests: int) -> dict[str, Any]:
    """Memory and descriptors after each hundred requests; slopes without the first two hundred."""
    looks = [server.counted() | {"requests": 0}]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, requests, EVERY):
            shares = [range(first + n, first + EVERY, AT_ONCE) for n in range(AT_ONCE)]
            list(pool.map(lambda share: ask_all(server.port, models, asked, share), shares))
            looks.append(server.counted() | {"requests": first + EVERY})
    kept = [look for look in looks if look["requests"] >= WARM_UP]
    counts = [look["requests"] for look in kept]
    names = ("resident_bytes", "tensor_bytes", "objects", "tasks", "threads", "descriptors")
    return {
        "requests": requests,
        "warm_up": WARM_UP,
        "a_request": {
            name: round(statistics.linear_regression(counts, [one[name] for one in kept]).slope, 4)
            for name in names
        },
        "first": {name: kept[0][name] for name in names},
        "last": {name: kept[-1][name] for name in names},
        "highest": {name: max(one[name] for one in kept) for name in names},
        "looks": looks,
    }


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

"""Sixteen clients that name eight adapters: their answers, and the tokens a second of all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_parts.adapters import NEW_TOKENS
from serving_parts.server import Client

CLIENTS = 16
ROUNDS = 5


def compare(
    port: int, names: list[str], asked: list[str], answers: Mapping[str, list[str]]
) -> dict[str, Any]:
    """The same requests one at a time and by all clients at once, in turn.

    Each client asks for its own adapter and prompt; every text is compared with `generate`'s.
    """
    work = [(names[n % len(names)], n % len(asked)) for n in range(CLIENTS)]
    clients = [Client(port) for _ in work]
    wrong = 0

    def ask(client: Client, adapter: str, number: int) -> int:
        nonlocal wrong
        body = {
            "model": adapter,
            "prompt": asked[number],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
        }
        status, said = client.ask("POST", "/v1/completions", body)
        if status != 200 or said["choices"][0]["text"] != answers[adapter][number]:
            wrong += 1
        return int(said["usage"]["completion_tokens"]) if status == 200 else 0

    rates: dict[str, list[float]] = {"one_at_a_time": [], "all_at_once": []}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(ROUNDS + 1):  # the first one warms up
            began = time.perf_counter()
            tokens = sum(ask(clients[0], *one) for one in work)
            rates["one_at_a_time"].append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            tokens = sum(pool.map(ask, clients, *zip(*work, strict=True)))
            rates["all_at_once"].append(tokens / (time.perf_counter() - began))
    for client in clients:
        client.close()
    pairs = zip(rates["all_at_once"][1:], rates["one_at_a_time"][1:], strict=True)
    return {
        "clients": CLIENTS,
        "adapters": len(names),
        "rounds": ROUNDS,
        "answers": 2 * CLIENTS * (ROUNDS + 1),
        "other_than_generate": wrong,
        "tokens_per_s": {name: round(statistics.median(kept[1:])) for name, kept in rates.items()},
        "times_as_fast": round(statistics.median(fast / slow for fast, slow in pairs), 2),
        "asked_times_as_fast": 4,
    }

"""How far a client's answers are from ours, on the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from clients_parts.contract import unpacked

Answer = dict[str, Any]


def distance(ours: Answer, theirs: Answer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Equal tokens and texts, of how many; the distance of the log-probabilities.

    `logprob` is the largest difference over the tokens of the continuations, `anywhere` over the
    whole vocabulary at their positions; `kl` the mean divergence of theirs from ours, nats a token,
    and `top1` the share of positions with the same likeliest token. `given` is the largest
    difference over completions, of their sums.
    """
    found: dict[str, Any] = {"rows": len(rows)}
    pairs = list(zip(ours["rows"], theirs["rows"], strict=True))
    for name in ("tokens", "text"):
        if all(name in other for _, other in pairs):
            found[f"equal_{name}"] = sum(mine[name] == other[name] for mine, other in pairs)
    if all("ids" in other for _, other in pairs):
        ends = set(ours["ends"])
        found["equal_ids"] = sum(mine["ids"] == cut(other["ids"], ends) for mine, other in pairs)
    if all("given" in other for _, other in pairs):
        found["given"] = max(abs(mine["given"] - other["given"]) for mine, other in pairs)
    if all("logprobs" in other for _, other in pairs):
        found |= logprobs(pairs, rows)
    return found


def logprobs(pairs: list[tuple[Any, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all positions."""
    p, q, chosen = [], [], []
    for (mine, other), row in zip(pairs, rows, strict=True):
        ids = row["continuation"]
        p += unpacked(mine["logprobs"], len(ids))
        q += unpacked(other["logprobs"], len(ids))
        chosen += ids
    # llama.cpp's probabilities add up to 1 to within 3e-5, which is more than what is looked for.
    log_p, log_q = normalized(p), normalized(q)
    at = np.arange(len(chosen)), np.array(chosen)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    return {
        "positions": len(chosen),
        "logprob": float(np.abs(log_p - log_q)[at].max()),
        "anywhere": float(np.abs(log_p - log_q).max()),
        "kl": max(0.0, float(kl)),
        "top1": float((log_p.argmax(1) == log_q.argmax(1)).mean()),
    }


def normalized(rows: list[Any]) -> np.ndarray:
    """Log-probabilities that add up to 1, (positions, vocabulary)."""
    given = np.array(rows, dtype=np.float64)
    return given - np.log(np.exp(given).sum(1, keepdims=True))


def cut(ids: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends an answer."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]

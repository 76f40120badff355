"""Laws of continuous batching: a request gets what it gets alone, whoever joins and leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from families import randomize_adapter, tiny_model
from hybrids import HYBRIDS, tiny_hybrid

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request, Ticket
from qlora_kit.generation.sampling import Sampling
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import inject_lora

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "all tokens": ("llama2", {}),
    "windows": ("mistral", {}),
    "windows beside all tokens": ("gemma2", {}),
    "keys shared between layers": ("gemma4", {}),
    "keys shared, by its own code": ("gemma3n", {}),
    "yarn, scaled by position": ("ministral3", {}),
    "longrope": ("phi3", {}),
    "dynamic": ("llama2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 128}),
}
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_p=0.7, top_k=9, seed=4),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.2, top_k=5, repetition_penalty=1.3),
]


def model_of(kind: str) -> Any:
    if kind in HYBRIDS:
        return tiny_hybrid(kind)
    family, changes = CACHES[kind]
    return tiny_model(family, **changes)


def requests_of(count: int, seed: int = 0, **more: Any) -> list[Request]:
    """Of many lengths, with settings of their own; some end by a token."""
    drawn = random.Random(seed)
    return [
        Request(
            [drawn.randrange(3, 264) for _ in range(drawn.choice([1, 2, 5, 5, 9, 14, 20]))],
            drawn.randrange(1, 14),
            frozenset(drawn.sample(range(264), 24)),
            SETTINGS[number % len(SETTINGS)],
            **more,
        )
        for number in range(count)
    ]


def alone(model: Any, request: Request, **options: Any) -> tuple[list[int], str | None]:
    engine = Engine(model, pad_id=0, **options)
    ticket = engine.add(request)
    while not engine.idle:
        engine.step()
    return ticket.tokens, ticket.end


@pytest.mark.parametrize("kind", [*CACHES, *HYBRIDS])
def test_rows_that_join_and_leave_get_what_they_get_alone(kind: str) -> None:
    model = model_of(kind)
    requests = requests_of(14)
    expected = [alone(model, request) for request in requests]
    drawn, waiting = random.Random(1), list(requests)
    engine = Engine(model, pad_id=0, most_tokens=40)
    tickets: list[Ticket] = []
    told: dict[Ticket, list[int | None]] = {}
    dropped: dict[Ticket, int] = {}
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), drawn.randrange(4))):
            tickets.append(engine.add(waiting.pop(0)))
        if drawn.random() < 0.1 and engine.num_running:
            ticket = drawn.choice([one for one in tickets if one.end is None])
            dropped[ticket] = len(ticket.tokens)
            engine.drop(ticket)
        for ticket, token in engine.step():
            told.setdefault(ticket, []).append(token)
    assert dropped
    for ticket, (tokens, end) in zip(tickets, expected, strict=True):
        if ticket in dropped:
            assert (ticket.tokens, ticket.end) == (tokens[: dropped[ticket]], "dropped")
            assert told.get(ticket, []) == ticket.tokens
        else:
            assert (ticket.tokens, ticket.end) == (tokens, end)
            assert told[ticket] == [*tokens, None]
    assert {ticket.end for ticket in tickets} == {"end token", "length", "dropped"}


def test_a_request_keeps_the_adapter_that_it_was_taken_with(bases: Path, tmp_path: Path) -> None:
    base = load_base(str(bases / "llama2"), bits=16, dtype="fp32", device="cpu")
    for number, name in enumerate("abc"):
        inject_lora(base.model, LoRAConfig(r=2 + number), seed=number, adapter=name)
        randomize_adapter(base.model, seed=number, scale=0.3)
        save_adapter(base, tmp_path / name, name)
    bank = AdapterBank(base)
    bank.use(None)
    for name in "abc":
        bank.add(name, tmp_path / name)
    requests = [Request([5, 9, 12 + place], 12, adapter=name) for place, name in enumerate("abc")]
    expected = [alone(base.model, request, bank=bank) for request in requests]
    engine = Engine(base.model, pad_id=0, bank=bank)
    tickets = [engine.add(request) for request in requests[:2]]
    engine.step()
    engine.step()
    # One goes and another comes under its name, one is merged, and a row joins.
    bank.remove("b")
    bank.add("b", tmp_path / "a")
    bank.merge("c")
    tickets.append(engine.add(requests[2]))
    for _ in range(3):
        engine.step()
    assert engine.num_running == 3
    while not engine.idle:
        engine.step()
    assert [(ticket.tokens, ticket.end) for ticket in tickets] == expected
    assert len({tuple(ticket.tokens) for ticket in tickets}) == 3

"""Laws of continuous batching: a request gets what it gets alone, whoever joins and leaves."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import random_model
from families import randomize_adapter, tiny_model
from hybrids import HYBRIDS, tiny_hybrid
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from qlora_kit import AdapterBank
from qlora_kit.base.decoder import CACHE
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request, Ticket
from qlora_kit.generation.sampling import Sampling
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.inject import inject_lora

CACHES = {
    "all tokens": "llama2",
    "windows": "mistral",
    "windows beside all tokens": "gemma2",
    "keys shared between layers": "gemma4",
    "keys shared, by its own code": "gemma3n",
    "yarn, scaled by position": "ministral3",
    "longrope": "phi3",
}
OWN = "a cache of its own"
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_p=0.7, top_k=9, seed=4),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.2, top_k=5, repetition_penalty=1.3),
]


class OwnCache(DynamicCache):
    """A cache of a kind that the engine does not know."""


def with_own_cache() -> Any:
    model = tiny_model()

    def bring(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = given.get(CACHE) or OwnCache(config=module.config)
        return args, {**given, CACHE: cache}

    model.register_forward_pre_hook(bring, with_kwargs=True)
    return model


def model_of(kind: str) -> Any:
    if kind == OWN:
        return with_own_cache()
    return tiny_hybrid(kind) if kind in HYBRIDS else tiny_model(CACHES[kind])


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


def interleaved(
    engine: Engine, requests: list[Request], seed: int = 1
) -> tuple[list[Ticket], dict[Ticket, list[int | None]]]:
    """The tickets of requests that join at random steps, some of them dropped, and all told."""
    drawn, waiting = random.Random(seed), list(requests)
    tickets: list[Ticket] = []
    told: dict[Ticket, list[int | None]] = {}
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), drawn.randrange(4))):
            tickets.append(engine.add(waiting.pop(0)))
        if drawn.random() < 0.1 and not engine.idle:
            engine.drop(drawn.choice([one for one in tickets if one.end is None]))
        for ticket, token in engine.step():
            told.setdefault(ticket, []).append(token)
    return tickets, told


def check_each_is_as_alone(
    tickets: list[Ticket],
    told: dict[Ticket, list[int | None]],
    expected: list[tuple[list[int], str | None]],
) -> None:
    for ticket, (tokens, end) in zip(tickets, expected, strict=True):
        if ticket.end == "dropped":
            assert ticket.tokens == tokens[: len(ticket.tokens)]
            assert told.get(ticket, []) == ticket.tokens
        else:
            assert (ticket.tokens, ticket.end) == (tokens, end)
            assert told[ticket] == [*tokens, None]
    assert {ticket.end for ticket in tickets} == {"end token", "length", "dropped"}


@pytest.mark.parametrize("kind", [*CACHES, *HYBRIDS, OWN])
def test_rows_that_join_and_leave_get_what_they_get_alone(kind: str) -> None:
    model = model_of(kind)
    requests = requests_of(10)
    expected = [alone(model, request) for request in requests]
    check_each_is_as_alone(
        *interleaved(Engine(model, pad_id=0, most_tokens=40), requests), expected
    )


@pytest.mark.parametrize("kind", [*CACHES, "lfm2", OWN])
def test_a_long_prompt_in_parts_gets_what_it_gets_whole(kind: str) -> None:
    """Where parts would not be what it is, it is computed whole."""
    model = model_of(kind)
    requests = [Request([5, 9, 40 + place, 77] * 8, 6) for place in range(3)]
    expected = [alone(model, request, most_tokens=99) for request in requests]
    engine = Engine(model, pad_id=0, most_tokens=7)
    first = engine.add(Request([3, 4], 14))
    engine.step()
    tickets = [engine.add(request) for request in requests]
    engine.step()
    in_parts = kind not in ("longrope", "lfm2", OWN)
    assert (len(tickets[0].tokens), engine.num_waiting) == ((0, 3) if in_parts else (1, 2))
    dropped = engine.add(requests[0])
    while not engine.idle:
        engine.step()
        if in_parts and len(tickets[2].tokens) == 2:
            assert not dropped.tokens
            engine.drop(dropped)
    assert [(ticket.tokens, ticket.end) for ticket in tickets] == expected
    assert (first.tokens, first.end) == alone(model, first.request)


@pytest.mark.parametrize("kind", ["longrope", "windows", "keys shared between layers"])
def test_cached_steps_equal_the_full_forward(kind: str) -> None:
    """Also where a row grows out of the length that the model was first trained for."""
    model = model_of(kind)
    for request in [Request([5, 6, 7] * 4, 12), Request([9], 20)]:
        tokens, _ = alone(model, request)
        with torch.no_grad():
            for place in range(len(tokens)):
                seen = torch.tensor([[*request.ids, *tokens[:place]]])
                logits = model(input_ids=seen, use_cache=False).logits[0, -1]
                assert logits.argmax() == tokens[place]


ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "alpha": 8.0},
    "b": {"r": 2, "alpha": 3.0, "target_modules": "all-linear"},
    "c": {"r": 7, "target_modules": "o_proj,down_proj", "adapter_dtype": "bf16"},
}


@pytest.fixture(scope="module")
def adapters(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, form) in enumerate(ADAPTERS.items()):
        base = load_base(str(bases / "llama2"), bits=16, dtype="fp32", device="cpu")
        inject_lora(base.model, LoRAConfig(**form), seed=number)
        randomize_adapter(base.model, scale=0.3)
        save_adapter(base, root / name)
    return root


def bank_of(bases: Path, adapters: Path, bits: int = 16) -> AdapterBank:
    bank = AdapterBank(load_base(str(bases / "llama2"), bits=bits, dtype="fp32", device="cpu"))
    for name in ADAPTERS:
        bank.add(name, adapters / name)
    return bank


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_of_a_batch_have_their_own_adapters(bases: Path, adapters: Path, bits: int) -> None:
    bank = bank_of(bases, adapters, bits)
    model, names = bank.base.model, [None, *ADAPTERS]
    base = requests_of(16)
    requests = [
        Request(**{**vars(one), "adapter": names[number % 4]}) for number, one in enumerate(base)
    ]
    expected = [alone(model, request, bank=bank) for request in requests]
    plain = [alone(model, request) for request in base]
    assert sum(one != other for one, other in zip(expected, plain, strict=True)) > 8
    bank.use("b")
    check_each_is_as_alone(*interleaved(Engine(model, pad_id=0, bank=bank), requests), expected)
    assert bank.active == "b"


def test_without_an_adapter_the_base_answers_also_where_the_bank_is_empty(
    bases: Path, adapters: Path
) -> None:
    bank = bank_of(bases, adapters)
    request = Request([5, 6, 7], 12)
    plain = alone(bank.base.model, request, bank=bank)
    with pytest.raises(ConfigError, match="for another model"):
        Engine(tiny_model(), pad_id=0, bank=bank)
    base = load_base(str(bases / "llama2"), bits=16, dtype="fp32", device="cpu")
    load_adapter(base, adapters / "a")
    assert alone(base.model, request) != plain
    assert alone(base.model, request, bank=AdapterBank(base)) == plain


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


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    return tiny_model()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [264]}, "the token 264"),
        ({"ids": [5] * 120}, "beyond the model's context of 128"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"adapter": "a"}, "there is no bank"),
    ],
)
def test_a_request_that_is_refused_changes_nothing(
    model: Any, changes: dict[str, Any], message: str
) -> None:
    engine, good = Engine(model, pad_id=0), Request([5, 6], 10)
    ticket = engine.add(good)
    engine.step()
    with pytest.raises(ConfigError, match=message):
        engine.add(Request(**{**vars(good), **changes}))
    assert (engine.num_waiting, engine.num_running) == (0, 1)
    while not engine.idle:
        engine.step()
    assert ticket.tokens == alone(model, good)[0]


def test_engines_in_two_threads_leave_other_models_alone(model: Any) -> None:
    """In the middle of both, and afterwards, another model sees its own padding."""
    other = tiny_model()
    other.set_attn_implementation("sdpa")
    ids, mask = torch.full((2, 8), 5), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0

    def padded() -> torch.Tensor:
        with torch.no_grad():
            return other(input_ids=ids, attention_mask=mask).logits  # type: ignore[no-any-return]

    right, found = padded(), []
    inside, done = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60)

    def stop(*_: Any) -> None:
        inside.wait()
        done.wait()

    models = [tiny_model(), tiny_model()]
    for one in models:
        one.register_forward_pre_hook(stop)
    prompts = [[[5, 6]], [[5, 6], [7]]]  # without padding and with it
    threads = []
    for one, ids_ in zip(models, prompts, strict=True):
        engine = Engine(one, pad_id=0)
        for prompt in ids_:
            engine.add(Request(prompt, 1))
        threads.append(threading.Thread(target=engine.step))
    for thread in threads:
        thread.start()
    inside.wait()
    found.append(padded())
    done.wait()
    for thread in threads:
        thread.join()
    found.append(padded())
    assert all(torch.equal(one, right) for one in found)


def test_a_model_without_a_cache_of_keys_is_refused_by_name() -> None:
    """mamba, mamba2, falcon_mamba and xlstm have nothing but states, recurrent_gemma keeps them."""
    with pytest.raises(ConfigError, match="with mamba models: they keep no keys and values"):
        Engine(random_model("mamba"), pad_id=0)
    # It takes a cache, and gives none back.
    model = random_model("recurrent_gemma", num_hidden_layers=3)
    with pytest.raises(ConfigError, match="with recurrent_gemma models: they keep no keys"):
        alone(model, Request([5, 6], 2))


def test_logits_that_are_not_finite_end_their_row_alone() -> None:
    model = tiny_model()
    good = [Request([5, 6, 7], 9), Request([8, 9], 5, sampling=Sampling(temperature=1.0))]
    expected = [alone(model, request) for request in good]
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    engine = Engine(model, pad_id=0)
    tickets = [engine.add(request) for request in good]
    engine.step()
    bad = engine.add(Request([5, 77], 9, sampling=Sampling(temperature=1.0, top_k=3)))
    assert (bad, None) in engine.step()
    assert (bad.tokens, bad.end) == ([], "error")
    assert isinstance(bad.error, NumericError)
    assert "not finite at new token 1" in str(bad.error)
    while not engine.idle:
        engine.step()
    assert [(ticket.tokens, ticket.end) for ticket in tickets] == expected


def test_where_memory_ends_for_a_prompt_that_request_ends_alone(model: Any) -> None:
    def full(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    good = Request([5, 6, 7], 9)
    expected = alone(model, good)
    handle = model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        engine = Engine(model, pad_id=0, most_tokens=60)
        first = engine.add(good)
        engine.step()
        bad, second = engine.add(Request([5] * 60, 9)), engine.add(good)
        while not engine.idle:
            engine.step()
    finally:
        handle.remove()
    assert (bad.end, type(bad.error)) == ("error", torch.OutOfMemoryError)
    assert [(ticket.tokens, ticket.end) for ticket in (first, second)] == [expected] * 2


class Full(TorchFunctionMode):
    """No memory for the third tensor of a cache, (B, heads, T, d), whose rows some function takes.

    `torch.cat` is also what a step makes a cache longer by: only along the rows it is counted.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function, self.count = function, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is not self._function or made.ndim != 4:
            return made
        self.count += func is not torch.cat or len(made) > len(args[0][0])
        if self.count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return made


@pytest.mark.parametrize("kind", ["all tokens", "windows", "falcon_h1"])
def test_where_memory_ends_for_a_join_those_that_would_join_end(kind: str) -> None:
    model = model_of(kind)
    good = [Request([5, 6, 7], 12), Request([8] * 9, 12)]
    expected = [alone(model, request) for request in good]
    engine = Engine(model, pad_id=0)
    tickets = [engine.add(request) for request in good]
    engine.step()
    engine.step()
    bad = [engine.add(Request([5] * 20, 9)) for _ in range(2)]
    with Full(torch.cat):
        told = engine.step()
    assert [one for one in told if one[0] in bad and one[1] is None] == [(one, None) for one in bad]
    assert {type(one.error) for one in bad} == {torch.OutOfMemoryError}
    late = engine.add(good[0])
    while not engine.idle:
        engine.step()
    assert [(ticket.tokens, ticket.end) for ticket in (*tickets, late)] == [*expected, expected[0]]


def test_where_memory_ends_for_a_row_that_leaves_the_others_go_on(model: Any) -> None:
    good = [Request([5, 6, 7], 12), Request([8] * 9, 2), Request([9] * 4, 12)]
    expected = [alone(model, request) for request in good]
    engine = Engine(model, pad_id=0)
    tickets = [engine.add(request) for request in good]
    with Full(torch.Tensor.index_select) as full:
        while not engine.idle:
            engine.step()
    assert full.count > 3
    assert [(ticket.tokens, ticket.end) for ticket in tickets] == expected


def test_any_other_error_drops_all_and_the_engine_goes_on(model: Any) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    engine = Engine(model, pad_id=0)
    tickets = [engine.add(Request([5, 6, 7], 9)) for _ in range(2)]
    engine.step()
    tickets.append(engine.add(Request([5], 9)))
    handle = model.register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    handle.remove()
    assert engine.idle
    assert {ticket.end for ticket in tickets} == {"dropped"}
    again = engine.add(tickets[0].request)
    while not engine.idle:
        engine.step()
    assert again.tokens == alone(model, again.request)[0]


def test_prompts_of_a_step_are_bounded_and_running_rows_go_on(model: Any) -> None:
    shapes: list[torch.Size] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    engine = Engine(model, pad_id=0, most_tokens=24)
    for count in (3, 3, 20, 11, 11, 60, 2):
        engine.add(Request([5] * count, 30))
    told = []
    for _ in range(8):
        told.append(len(engine.step()))
    handle.remove()
    prompts = [shape for shape in shapes if shape[1] > 1]
    assert [tuple(shape) for shape in prompts] == [
        (2, 3),
        (1, 20),
        (2, 11),
        (1, 24),
        (1, 24),
        (1, 12),
        (1, 2),
    ]
    assert told == [2, 3, 5, 5, 5, 6, 7, 7]


def test_a_dropped_row_counts_no_more_and_a_place_is_free_at_once(model: Any) -> None:
    engine = Engine(model, pad_id=0)
    tickets = [engine.add(Request([5 + place], 9)) for place in range(3)]
    engine.step()
    waits = engine.add(Request([9], 9))
    engine.drop(tickets[1])
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    engine.drop(waits)
    assert (engine.num_running, engine.num_waiting) == (2, 0)
    for ticket in tickets:
        engine.drop(ticket)
    assert engine.idle


def held_bytes() -> int:
    """Of all tensors that live."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_is_flat_over_many_requests_that_end_or_are_dropped(model: Any) -> None:
    engine, drawn = Engine(model, pad_id=0), random.Random(0)
    before = held_bytes()
    for round_ in range(20):
        tickets = [engine.add(request) for request in requests_of(10, round_)]
        for _ in range(drawn.randrange(6)):
            engine.step()
        for ticket in tickets:
            engine.drop(ticket)
        assert engine.idle
    del tickets, ticket
    assert held_bytes() == before


@pytest.mark.parametrize("kind", [*CACHES, "lfm2", "falcon_h1"])
def test_the_bytes_of_a_cache_are_said_before_it_is_there(kind: str) -> None:
    model = model_of(kind)
    engine = Engine(model, pad_id=0)
    for rows, tokens in [(1, 1), (1, 5), (3, 30)]:
        with torch.no_grad():
            ids = torch.full((rows, tokens), 5)
            layers = getattr(model(input_ids=ids, use_cache=True), CACHE).layers
        held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        for layer in layers:
            for name in ("conv_states", "recurrent_states"):
                held += getattr(layer, name, {}).values()
        expected = sum(one.numel() * one.element_size() for one in held if one is not None)
        assert engine.cache_bytes(tokens, rows) == expected
    assert Engine(with_own_cache(), pad_id=0).cache_bytes(1) is None

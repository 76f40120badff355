"""What the API answers is what `generate` writes for that adapter alone, whoever else asks."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from served import HOW, Served, refusal

from qlora_kit.base.load import load_base
from qlora_kit.base.source import TINY
from qlora_kit.data.encode import prompt_ids
from qlora_kit.generation.decode import answers
from qlora_kit.generation.engine import Engine
from qlora_kit.lora.bank import AdapterBank

PROMPTS = ("Once upon a time", "1 + 2 =", "Hello")
LENGTH = 8
GREEDY = {"temperature": 0, "max_tokens": LENGTH}


@pytest.fixture(scope="module")
def alone(adapters: dict[str, Path]) -> dict[tuple[str, str, bool], str]:
    """The answer of each model to each prompt, as a chat or plain, each one by itself."""
    base = load_base(str(TINY), **HOW)
    bank, found = AdapterBank(base), {}
    for name, directory in adapters.items():
        bank.add(name, directory)
    for name in ("tiny", "sql", "qa", "noise"):
        with bank.using(None if name == "tiny" else name):
            for prompt in PROMPTS:
                for chat in (False, True):
                    ids = prompt_ids(prompt, base.tokenizer, chat)
                    texts = answers(base.model, base.tokenizer, [ids], max_new_tokens=LENGTH)
                    found[name, prompt, chat] = next(texts)
    return found


def ask(client: Any, name: str, prompt: str, chat: bool, **more: Any) -> Any:
    body = {"model": name, **GREEDY, **more}
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        return client.post("/v1/chat/completions", json=body)
    return client.post("/v1/completions", json={**body, "prompt": prompt})


def text_of(response: Any, chat: bool) -> str:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"] if chat else choice["text"]


def test_all_at_once_get_what_each_gets_alone(
    server: Served, alone: dict[tuple[str, str, bool], str]
) -> None:
    assert len(set(alone.values())) > len(alone) / 2  # else nothing is told apart
    with server.client() as client, ThreadPoolExecutor(len(alone)) as pool:
        jobs = {key: pool.submit(ask, client, *key) for key in alone}
        found = {key: text_of(job.result(), key[2]) for key, job in jobs.items()}
    assert found == alone


def test_an_answer_that_fails_fails_alone(
    server: Served, alone: dict[tuple[str, str, bool], str]
) -> None:
    keys = [key for key in alone if key[1] == PROMPTS[0]]
    with server.client() as client, ThreadPoolExecutor(len(alone)) as pool:
        wrong = [pool.submit(ask, client, "broken", PROMPTS[0], chat) for chat in (False, True)]
        good = {key: pool.submit(ask, client, *key) for key in keys}
        assert {key: text_of(job.result(), key[2]) for key, job in good.items()} == {
            key: alone[key] for key in keys
        }
        for job in wrong:
            assert refusal(job.result(), 500)["code"] == "not_finite"
    assert any("NumericError" in line for line in server.log)


def test_a_step_that_fails_ends_its_answers_and_not_the_server(
    server: Served,
    alone: dict[tuple[str, str, bool], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Engine.step

    def fails_once(engine: Engine) -> Any:
        monkeypatch.setattr(Engine, "step", step)
        raise RuntimeError("a fault at /a/path")

    with server.client() as client:
        monkeypatch.setattr(Engine, "step", fails_once)
        assert refusal(ask(client, "sql", PROMPTS[0], True), 500)["code"] == "internal"
        text = text_of(ask(client, "sql", PROMPTS[0], True), True)
    assert text == alone["sql", PROMPTS[0], True]
    assert any("RuntimeError: a fault" in line for line in server.log)


def test_a_stream_is_the_whole_answer_in_pieces(
    server: Served, alone: dict[tuple[str, str, bool], str]
) -> None:
    """With the API's own client, which checks the objects."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="noise",
        messages=[{"role": "user", "content": PROMPTS[0]}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=LENGTH,
    )
    *chunks, last, counted = stream
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(pieces) == alone["noise", PROMPTS[0], True]
    assert last.choices[0].finish_reason == "length"
    assert (counted.choices, counted.usage.completion_tokens) == ([], LENGTH)
    assert counted.usage.total_tokens == counted.usage.prompt_tokens + LENGTH
    plain = client.completions.create(model="qa", prompt=PROMPTS[0], stream=True, **GREEDY)
    texts = [chunk.choices[0].text for chunk in plain]
    assert "".join(texts) == alone["qa", PROMPTS[0], False]


def test_models_are_the_base_and_the_adapters(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny", "sql", "qa", "noise", "broken"]
    assert client.models.retrieve("sql").object == "model"


def test_an_answer_ends_before_a_stop_string(
    server: Served, alone: dict[tuple[str, str, bool], str]
) -> None:
    whole = alone["noise", PROMPTS[1], False]
    stop = whole[len(whole) // 2 :][:3]
    with server.client() as client:
        one = ask(client, "noise", PROMPTS[1], False, stop=[stop, "never there"])
        assert text_of(one, False) == whole[: whole.index(stop)]
        assert one.json()["choices"][0]["finish_reason"] == "stop"
        counts = one.json()["usage"]
        assert 0 < counts["completion_tokens"] < LENGTH


def test_the_seed_decides_what_is_drawn(server: Served) -> None:
    with server.client() as client:

        def drawn(**more: Any) -> str:
            return text_of(ask(client, "qa", "Hello", True, temperature=1.5, **more), True)

        assert drawn(seed=3) == drawn(seed=3)
        assert len({drawn() for _ in range(3)}) > 1
        likeliest = text_of(ask(client, "qa", "Hello", True), True)
        assert drawn(top_k=1) == drawn(top_p=1e-6) == drawn(top_p=0) == likeliest


def test_messages_reach_the_template_as_text_alone(server: Served) -> None:
    """Parts of a content are one text, and control tokens in it are letters."""
    with server.client() as client:

        def counted(content: Any) -> int:
            messages = [{"role": "user", "content": content}]
            body = {"model": "tiny", "messages": messages, "max_tokens": 1}
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            return response.json()["usage"]["prompt_tokens"]

        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo there"}]
        assert counted(parts) == counted("Hello there")
        assert counted("<|end|>") > counted("a") + 1
        assert 0 < counted("") < counted("a")
        body = {"model": "tiny", "prompt": "<|end|>", "max_tokens": 1}
        plain = client.post("/v1/completions", json=body).json()
        ids = client.post("/v1/completions", json={**body, "prompt": [[1, 5, 7]]}).json()
        assert (plain["usage"]["prompt_tokens"], ids["usage"]["prompt_tokens"]) == (2, 3)


def test_the_log_has_a_line_for_each_request_and_no_word_of_it(server: Served) -> None:
    with server.client() as client:
        ask(client, "sql", "a very secret prompt", True)
        client.get("/v1/models/not-there%1b[31m")
    (line,) = [one for one in server.log[-2:] if "sql" in one]
    assert line[9:].startswith("POST /v1/chat/completions 200 ")
    assert "tokens/s" in line
    log = json.dumps(server.log)
    assert "secret" not in log
    assert "not-there" not in log

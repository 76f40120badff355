"""A server while it runs: places that become free, keys, adapters that come and go, its end."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import KEY, Served, refusal, serving
from trained import save_trained

from qlora_kit.base import packed_matmul
from qlora_kit.base.source import TINY
from qlora_kit.device.found import with_room
from qlora_kit.errors import ResourceError
from qlora_kit.serving.listen import listening
from qlora_kit.serving.room import OF_CACHE
from qlora_kit.serving.scheduler import FAILURES
from qlora_kit.serving.server import SPARE_CONNECTIONS

LONG = {"model": "noise", "prompt": "Hello", "temperature": 0, "max_tokens": 400, "stream": True}
SHORT = {"model": "noise", "prompt": "Hello", "temperature": 0, "max_tokens": 2}


@contextmanager
def streaming(client: httpx.Client, **more: Any) -> Iterator[Iterator[str]]:
    """The lines of an answer that is being written: its first piece has come."""
    with client.stream("POST", "/v1/completions", json=LONG | more) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        next(lines)
        yield lines


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counts(server: Served) -> tuple[int, int]:
    health = server.health()
    return health["running"], health["waiting"]


def test_pieces_are_sent_at_once() -> None:
    """asyncio sets that for the sockets of this protocol, and for no others."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.proto == socket.IPPROTO_TCP


def test_localhost_is_trusted_where_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("localhost", 0):
        pass
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ResourceError, match="which other machines reach"):
        listening("localhost", 0)


def test_a_client_that_leaves_frees_its_place(keyed: Served) -> None:
    """One that is streamed to, one that waits for a whole answer, and one in the queue."""
    with keyed.client() as client, streaming(client):
        with keyed.client() as other, suppress(httpx.ReadTimeout):
            other.post("/v1/completions", json=SHORT, timeout=0.3)
        until(lambda: counts(keyed) == (1, 0))
    until(lambda: counts(keyed) == (0, 0))
    with keyed.client() as client, suppress(httpx.ReadTimeout):
        client.post("/v1/completions", json=LONG | {"stream": False}, timeout=0.3)
    until(lambda: counts(keyed) == (0, 0))
    with keyed.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 200
    assert any(line.endswith(", left") for line in keyed.log)


def test_what_the_queue_has_no_room_for_is_told_to_come_back(keyed: Served) -> None:
    with keyed.client() as client, streaming(client), streaming_request(keyed) as waiting:
        until(lambda: counts(keyed) == (1, 1))
        response = client.post("/v1/completions", json=SHORT)
        error = refusal(response, 429)
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
        assert response.headers["retry-after"] == "1"
        assert not waiting.is_closed
    until(lambda: counts(keyed) == (0, 0))


@contextmanager
def streaming_request(server: Served) -> Iterator[httpx.Response]:
    """A stream that has no piece yet, for it waits."""
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        yield response


def test_a_row_waits_until_the_cache_has_room_for_it(
    server: Served, adapters: dict[str, Path]
) -> None:
    """The places are not all: one answer of the length that is left fills the cache."""
    whole = server.service.room
    assert whole.cache is not None
    a_token = whole.cache // (whole.limits.max_length * server.service.scheduler.max_batch)
    free, first = int(600 * a_token / OF_CACHE) + 1, {"noise": adapters["noise"]}
    with with_room(free), serving(first, key=KEY) as one:
        assert one.service.room.limits.max_length == 600
        assert one.service.room.cache == 600 * a_token
        with one.client() as client:
            body = LONG | {"prompt": [5] * 400, "max_tokens": 201}
            error = refusal(client.post("/v1/completions", json=body), 400)
            assert error["code"] == "context_length_exceeded"
            with streaming(client, max_tokens=100) as lines, streaming_request(one):
                until(lambda: counts(one) == (1, 1))
                assert sum(1 for _ in lines) > 3
                until(lambda: counts(one) == (1, 0))
        until(lambda: counts(one) == (0, 0))
    assert sum("note: max_length is 600 and not 1024" in line for line in one.log) == 1


def test_adapters_come_while_there_is_room_for_them(adapters: dict[str, Path]) -> None:
    with with_room(2**22), serving({"noise": adapters["noise"]}, key=KEY) as one:
        bank, room = one.service.bank, one.service.room.adapters

        def added(name: str, adapter: str = "sql") -> httpx.Response:
            add = {"name": name, "path": str(adapters[adapter])}
            return client.post("/v1/adapters", json=add)

        with one.client() as client:
            refused = refusal(added("large", "noise"), 503)
            assert refused["code"] == "out_of_memory"
            assert added("0").status_code == 200
            most = room // bank.nbytes("0")
            for number in range(1, most):
                assert added(str(number)).status_code == 200
            refusal(added("more"), 503)
            assert client.delete("/v1/adapters/0").status_code == 200
            until(lambda: "0" not in bank.names)
            assert added("more").status_code == 200


def test_of_connections_beyond_the_most_those_that_ask_nothing_are_closed(keyed: Served) -> None:
    host, port = keyed.url.removeprefix("http://").split(":")
    with ExitStack() as opened:
        for _ in range(1 + 1 + SPARE_CONNECTIONS + 1):
            opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
        assert keyed.health()["status"] == "ok"  # they would keep their places for 20 seconds


def test_a_server_that_computes_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of one step and the next are its requests'; many in a row are the server's."""
    fault: BaseException = RuntimeError("a fault of the device")

    def fails() -> None:
        raise fault

    body = SHORT | {"model": "tiny"}
    with serving({}) as server, server.client() as client:
        with monkeypatch.context() as broken:
            broken.setattr(server.service.scheduler._engine, "step", fails)
            for _ in range(FAILURES):
                assert client.get("/health").status_code == 200
                refusal(client.post("/v1/completions", json=body), 500)
            until(lambda: client.get("/health").status_code == 503)
            assert client.get("/health").json()["status"] == "failing"
        assert client.post("/v1/completions", json=body).status_code == 200
        until(lambda: client.get("/health").json()["status"] == "ok")


def test_nobody_asks_without_the_key(keyed: Served) -> None:
    with keyed.client(headers={}) as client:
        for key in (
            None,
            "",
            "Bearer",
            f"Basic {KEY}",
            "Bearer wrong",
            f"Bearer {KEY}x",
            "Bearer ü",
        ):
            headers = {} if key is None else {"authorization": key.encode()}
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/x")):
                response = client.request(method, path, headers=headers)
                assert refusal(response, 401)["code"] == "invalid_api_key"
        assert client.get("/health").status_code == client.get("/").status_code == 200
    with keyed.client() as client:
        # A proxy may stand before it, and names it otherwise.
        named = {**keyed.headers, "host": "models.example", "origin": "https://models.example"}
        assert client.get("/v1/models", headers=named).status_code == 200
    assert KEY not in json.dumps(keyed.log)


def test_adapters_come_and_go_while_others_are_asked(
    keyed: Served, adapters: dict[str, Path], server: Served
) -> None:
    with server.client() as client:
        expected = client.post("/v1/completions", json=SHORT | {"model": "sql"}).json()
    with keyed.client() as client, streaming(client) as lines:
        add = {"name": "sql", "path": str(adapters["sql"])}
        assert client.post("/v1/adapters", json=add).json()["id"] == "sql"
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [
            *("tiny", "noise", "sql")
        ]
        assert refusal_of(client, add, 409)["param"] == "name"
        # The one that is being answered goes on with what it has.
        assert client.delete("/v1/adapters/noise").json()["deleted"] is True
        assert refusal(client.post("/v1/completions", json=SHORT), 404)["code"] == "model_not_found"
        refusal(client.delete("/v1/adapters/noise"), 404)
        again = {"name": "noise", "path": str(adapters["noise"])}
        assert "still" in refusal_of(client, again, 409)["message"]
        assert sum(line.startswith("data: {") for line, _ in zip(lines, range(9), strict=False)) > 3
    with keyed.client() as client:
        found = client.post("/v1/completions", json=SHORT | {"model": "sql"}).json()
        assert found["choices"] == expected["choices"]
        until(lambda: "noise" not in keyed.service.bank.names)
        assert client.post("/v1/adapters", json=again).status_code == 200
        assert client.post("/v1/completions", json=SHORT).status_code == 200
        assert client.delete("/v1/adapters/sql").status_code == 200
        until(lambda: keyed.service.bank.names == ("noise",))


@contextmanager
def reading_nothing(server: Served) -> Iterator[None]:
    """No prompt is made tokens of until the context is left: a long one is before them."""
    over = threading.Event()
    server.service.models._reading.submit(over.wait)
    try:
        yield
    finally:
        over.set()


def test_a_prompt_that_is_not_read_yet_has_a_place_in_the_queue(keyed: Served) -> None:
    with keyed.client() as client, ThreadPoolExecutor(2) as pool, reading_nothing(keyed):
        first = [pool.submit(client.post, "/v1/completions", json=SHORT) for _ in range(2)]
        until(lambda: counts(keyed) == (0, 2))
        assert refusal(client.post("/v1/completions", json=SHORT), 429)["code"] == "queue_full"
    assert [one.result().status_code for one in first] == [200, 200]
    assert counts(keyed) == (0, 0)


def test_the_prompt_of_a_client_that_left_is_not_read(keyed: Served) -> None:
    before = len(keyed.log)
    with keyed.client() as client, reading_nothing(keyed):
        with suppress(httpx.ReadTimeout):
            client.post("/v1/completions", json=SHORT, timeout=0.3)
        until(lambda: any(" 499 " in line for line in keyed.log[before:]))
        assert counts(keyed) == (0, 0)


def test_an_adapter_that_went_while_a_prompt_was_read_does_not_answer_it(
    keyed: Served, adapters: dict[str, Path]
) -> None:
    """Nor does the next one of its name, which may write prompts otherwise."""
    with ThreadPoolExecutor(2) as pool, keyed.client() as client:
        for again in (False, True):
            add = {"name": "qa", "path": str(adapters["qa"])}
            assert client.post("/v1/adapters", json=add).status_code == 200
            with reading_nothing(keyed):
                body = SHORT | {"model": "qa"}
                asked = pool.submit(client.post, "/v1/completions", json=body)
                until(lambda: counts(keyed) == (0, 1))
                assert client.delete("/v1/adapters/qa").status_code == 200
                if again:
                    until(lambda: "qa" not in keyed.service.bank.names)
                    assert client.post("/v1/adapters", json=add).status_code == 200
            assert refusal(asked.result(), 404)["code"] == "model_not_found"
        assert client.delete("/v1/adapters/qa").status_code == 200


def test_a_server_ends_while_a_prompt_is_read(adapters: dict[str, Path]) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as reading:
        with serving({"noise": adapters["noise"]}, grace_s=0.0) as server:
            reading.enter_context(reading_nothing(server))
            asked = pool.submit(server.client().post, "/v1/completions", json=SHORT)
            until(lambda: counts(server) == (0, 1))
        assert refusal(asked.result(), 503)["code"] == "shutting_down"
        reader = next(one for one in threading.enumerate() if one.name == "tokens")
        assert reader.daemon  # Python waits for all others


def refusal_of(client: httpx.Client, add: dict[str, str], status: int) -> dict[str, Any]:
    response = client.post("/v1/adapters", json=add)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_an_adapter_brings_its_own_template(
    keyed: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """It is added with the template, and nothing is left out of a chat without a word."""
    folder = tmp_path / "own"
    shutil.copytree(adapters["qa"], folder)
    users = "{% if m.role == 'user' %}[{{ m.content }}]{% endif %}"
    template = "{% for m in messages %}" + users + "{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    user = {"role": "user", "content": "Hello"}
    with keyed.client() as client:
        add = {"name": "own", "path": str(folder)}
        assert client.post("/v1/adapters", json=add).status_code == 200
        counted = {}
        for name in ("own", "tiny"):
            body = {"model": name, "messages": [user], "max_tokens": 1}
            answered = client.post("/v1/chat/completions", json=body).json()
            counted[name] = answered["usage"]["prompt_tokens"]
        plain = client.post("/v1/completions", json=SHORT | {"prompt": "[Hello]"}).json()
        assert counted["own"] == plain["usage"]["prompt_tokens"] != counted["tiny"]
        body = {"model": "own", "messages": [{"role": "system", "content": "Be."}, user]}
        error = refusal(client.post("/v1/chat/completions", json=body), 400)
        assert "leaves out the system message" in error["message"]
        body = {"model": "tiny", "messages": [user | {"name": "Ruth"}]}
        error = refusal(client.post("/v1/chat/completions", json=body), 400)
        assert ("leaves out the name" in error["message"], error["param"]) == (True, "messages")
        assert client.delete("/v1/adapters/own").status_code == 200


def test_what_is_no_adapter_is_refused_and_nothing_is_added(
    keyed: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = keyed.service.bank.names, keyed.service.models.names
    good = str(adapters["qa"])
    (tmp_path / "adapter_config.json").write_text("{")
    with keyed.client() as client:
        for add in (
            {"name": "a", "path": "/does/not/exist"},
            {"name": "a", "path": str(tmp_path)},
            {"name": "a", "path": "/etc/passwd"},
            {"name": "a", "path": "a\0b"},
            {"name": "tiny", "path": good},
            {"name": "base", "path": good},
            {"name": "../a", "path": good},
            {"name": ".", "path": good},
            {"name": "..", "path": good},
            {"name": "a", "path": "a" * 4096},
            {"name": "a\x1b[31m", "path": good},
            {"name": "", "path": good},
            {"name": "a"},
            {"name": "a", "path": good, "bits": 4},
        ):
            response = client.post("/v1/adapters", json=add)
            assert response.status_code in (400, 409), (add, response.text)
        refusal(client.delete("/v1/adapters/tiny"), 400)
    assert before == (keyed.service.bank.names, keyed.service.models.names)


def test_an_adapter_of_a_base_in_other_bits_is_refused_unless_a_flag_decides_them(
    adapters: dict[str, Path], keyed: Served, tmp_path: Path
) -> None:
    """As it is at the start: in 4 bits the base is another model than the one in 16."""
    save_trained(TINY, tmp_path / "four", bits=4, dtype="fp32")
    add = {"name": "four", "path": str(tmp_path / "four")}
    with serving({"qa": adapters["qa"]}, key=KEY, bits=None) as server, server.client() as client:
        answer = client.post("/v1/adapters", json=add)
        assert "bits 4 and 16" in refusal(answer, 400)["message"]
        assert server.service.bank.names == ("qa",)
    with keyed.client() as client:  # with --bits 16
        assert client.post("/v1/adapters", json=add).status_code == 200
        assert client.delete("/v1/adapters/four").status_code == 200


def test_a_server_that_ends_tells_those_that_wait(adapters: dict[str, Path]) -> None:
    with serving({"noise": adapters["noise"]}, max_batch=1, grace_s=0.0) as server:
        client, other = server.client(), server.client()
        first = client.stream("POST", "/v1/completions", json=LONG)
        second = other.stream("POST", "/v1/completions", json=LONG)
        lines = [first.__enter__().iter_lines(), second.__enter__().iter_lines()]
        next(lines[0])
        until(lambda: counts(server) == (1, 1))
    for one in lines:
        *_, error, done = [line for line in one if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
    assert server.service.scheduler.counts == (0, 0)


@pytest.mark.skipif(not packed_matmul._is_right(), reason="no kernel for packed weights")
def test_what_steps_keep_is_counted_before_caches_and_left_where_it_does_not_fit() -> None:
    rooms, said = [], "of weights laid out for decoding"
    for free in (2**30, 2**20):
        with with_room(free), serving({}, bits=4, dtype="bf16") as one:
            until(lambda: any("serving tiny" in line for line in one.log))
            rooms.append(one.service.room)
            assert one.service.bank.most_of_rows == rooms[-1].rows
            assert any(said in line for line in one.log) == (free == 2**30)
    large, small = rooms
    assert large.copies > 0 == small.copies
    assert large.cache is not None
    assert large.copies + large.cache + large.adapters + large.rows <= 2**30

"""Requests that are wrong, too large, half, or sent by somebody else: what a server refuses.

Each is bytes on a line of its own, with the key unless the key is what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serving_parts.server import request_bytes

CHAT, TEXT, ADAPTERS = "/v1/chat/completions", "/v1/completions", "/v1/adapters"
MODEL = "task0"
MESSAGES = [{"role": "user", "content": "hello"}]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": MESSAGES, "max_tokens": 2},
    TEXT: {"model": MODEL, "prompt": "hello", "max_tokens": 2},
    ADAPTERS: {"name": "another", "path": "/nowhere"},
}
LARGE = 4 * 2**20
"""Bytes of a body that is too large, beyond four times the limit of the tiny base."""


@dataclass(frozen=True)
class Case:
    """One request: its kind, what is wrong with it, and its bytes."""

    kind: str
    name: str
    data: bytes
    ends: bool = False
    """whether the client's end of file comes behind it"""
    slow: bool = False
    """whether the server has to wait for more, until it does not"""
    no_request: bool = False
    """whether it is too little for an answer: the connection may be closed without one"""


class Raw(str):
    """A value that is written into JSON as it stands."""


def body(path: str, /, **changes: Any) -> bytes:
    """A good body with some fields changed; `Raw` values as they stand."""
    fields = {**GOOD[path], **changes}
    parts = [
        f"{json.dumps(name)}: {value if isinstance(value, Raw) else json.dumps(value)}"
        for name, value in fields.items()
    ]
    return ("{" + ", ".join(parts) + "}").encode("utf-8", "surrogatepass")


def posted(kind: str, name: str, path: str, data: bytes, **headers: str) -> Case:
    """A body sent to a path."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(kind, f"{path}: {name}", request_bytes("POST", path, data, named))


def wrong_types() -> Iterator[Case]:
    """A value of a wrong type in every field, and numbers that are none of the field's."""
    number = ["1", [], {}, True, -1, Raw("1e999"), Raw("NaN"), Raw("9" * 400)]
    text = [1, [1.5], {}, True, Raw('"\\ud800"')]
    whole = [*number, 1.5]
    wrong: dict[str, list[Any]] = {
        "model": [*text, [], "", None],
        "max_tokens": [*whole, 0],
        "temperature": [*number, 3],
        "top_p": [*number, 1.5],
        "top_k": whole,
        "repetition_penalty": [*number, 0],
        "seed": [one for one in whole if one != -1],
        "stop": [1, {}, True, [1], [[]], [""], ["a"] * 17, "s" * 2000, Raw('"\\udfff"')],
        "stream": [1, "true", [], {}],
        "stream_options": [1, "x", [], True, {"include_usage": 3}],
        "n": [2, 0, -1, "1", [], True],
        "logit_bias": [{"1": 5}, [1], "x"],
        "presence_penalty": [1, "0", []],
    }
    messages = [1, "hello", {}, [], [1], [[]], ["hello"], [None], [{}]]
    messages += [[{"role": role, "content": "x"}] for role in (1, None, "root", "", [], {})]
    messages += [[{"role": "user", "content": one}] for one in (1, True, {}, [1], [{"type": "x"}])]
    messages += [MESSAGES * 600, Raw('[{"role": "user", "content": "\\ud83d"}]')]
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    messages.append([{"role": "user", "content": [image]}])
    prompts = [1, True, {}, [], [[]], [-1], [1.5], [10**9], [10**30], ["a", "b"], [None]]
    prompts += [[[1], [2]], ["a", 1], [[True]], Raw('"\\ud800"'), "word " * 5000, [5] * 5000]
    for path, field, values in ((CHAT, "messages", messages), (TEXT, "prompt", prompts)):
        for value in values:
            yield posted(
                "types", f"{field} = {str(value)[:40]}", path, body(path, **{field: value})
            )
    for number_, (field, values) in enumerate(wrong.items()):
        for value in values:
            path = (CHAT, TEXT)[number_ % 2]
            yield posted(
                "types", f"{field} = {str(value)[:40]}", path, body(path, **{field: value})
            )
    for name in ("temprature", "", "\0", "__class__", "x" * 5000):
        yield posted("types", f"field {name[:20]!r}", CHAT, body(CHAT, **{name: 1}))


def broken_json() -> Iterator[Case]:
    """Bodies that are no JSON object, deep ones, and large ones."""
    texts = [
        b"",
        b"{",
        b"}",
        b"[1",
        b"nul",
        b"{'model': 1}",
        b'{"model": "a",}',
        b"\xff\xfe",
        b"\0",
    ]
    texts += [b"[]", b"1", b'"x"', b"null", b"true", b"\x1f\x8b\x08\0\0", b'{"model": "\xff"}']
    texts += [b"\xef\xbb\xbf{}", '{"model": "a"}'.encode("utf-16"), b"model=a&prompt=b", b"{}{}"]
    for text in texts:
        yield posted("JSON", repr(text[:30]), CHAT, text)
        yield posted("JSON", repr(text[:30]), TEXT, text)
    for deep in (200, 5000, 100_000):
        yield posted("depth", f"{deep} lists", CHAT, b"[" * deep + b"]" * deep)
        nested = Raw("[" * deep + "]" * deep)
        yield posted("depth", f"{deep} lists as messages", CHAT, body(CHAT, messages=nested))
        objects = Raw('{"a":' * deep + "1" + "}" * deep)
        yield posted("depth", f"{deep} objects in tools", CHAT, body(CHAT, tools=objects))
    many = Raw("{" + ", ".join(f'"x{n}": {n}' for n in range(20_000)) + "}")
    yield posted("size", "an object of 20,000 fields", TEXT, body(TEXT, logit_bias=many))
    faults = Raw("[" + ", ".join(["{}"] * 250_000) + "]")
    parts = Raw('[{"role": "user", "content": ' + faults + "}]")
    yield posted("size", "250,000 wrong parts", CHAT, body(CHAT, messages=parts))
    yield posted("size", "250,000 wrong messages", CHAT, body(CHAT, messages=faults))
    halves = Raw("[" + ", ".join(["1.5"] * 200_000) + "]")
    yield posted("size", "200,000 halves of tokens", TEXT, body(TEXT, prompt=halves))
    controls = [{"role": "user", "content": "<|end|>" * 100_000}]
    yield posted("size", "100,000 control tokens", CHAT, body(CHAT, messages=controls))
    large = b" " * LARGE
    yield posted("size", "spaces", CHAT, large)
    yield posted("size", "a long prompt", TEXT, body(TEXT, prompt="a" * LARGE))
    for length in ("99999999999", "9" * 30):
        yield posted("size", f"announced: {length}", CHAT, b"{}", Content_Length=length)
    chunk = b"%x\r\n%s\r\n" % (LARGE // 4, b" " * (LARGE // 4))
    endless = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    yield Case("size", "chunks", request_bytes("POST", CHAT, b"", endless) + 8 * chunk)


def unknown_models() -> Iterator[Case]:
    """Names that no model has."""
    for name in ("none", "TASK0", "task0 ", " task0", "task0/", "../task0", "/etc/passwd", "*"):
        yield posted("model", name, CHAT, body(CHAT, model=name))
    for name in (
        "\0",
        "task0\0",
        "a" * 400,
        "a" * 10_000,
        "\u202e",
        "💥" * 50,
        "%s%n",
        "a\r\nb: c",
    ):
        yield posted("model", repr(name[:20]), TEXT, body(TEXT, model=name))
    for name in ("none", "%00", "..%2f..%2fetc%2fpasswd", "a" * 8000, "%ff%fe", "task0%0d%0aX:1"):
        yield Case("model", f"GET {name[:30]}", request_bytes("GET", f"/v1/models/{name}"))


def methods_and_paths() -> Iterator[Case]:
    """Methods that a path has not, and paths that the server has not."""
    for path in (CHAT, TEXT, ADAPTERS, "/v1/models", "/", "/health"):
        for method in ("PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "BREW"):
            yield Case("method", f"{method} {path}", request_bytes(method, path))
    for path in (CHAT, TEXT, ADAPTERS):
        yield Case("method", f"GET {path}", request_bytes("GET", path))
    for path in ("/docs", "/openapi.json", "/redoc", "/metrics", "/v1", "/v1/", "//v1/models/"):
        yield Case("path", path, request_bytes("GET", path))
    paths = ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.html/..", "/..%5c..%5cx"]
    paths += ["/page.py", "/serving/page.html", "/.git/config", "/v1/embeddings", "/" + "a" * 9000]
    for path in paths:
        yield Case("path", path[:40], request_bytes("GET", path))
    for path in ("/v1/embeddings", "/v1/models", "/", "/v1/chat/completions/"):
        yield Case("path", f"POST {path}", request_bytes("POST", path, b"{}"))


def bad_headers() -> Iterator[Case]:
    """Headers and request lines that are none, or that contradict each other."""
    data = body(CHAT)
    wrong = [
        {"Content-Length": "abc"},
        {"Content-Length": "-1"},
        {"Content-Length": "1, 2"},
        {"Content-Length": "+5"},
        {"Transfer-Encoding": "chunked, gzip"},
        {"Transfer-Encoding": "identity"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip", "Content-Type": "application/gzip"},
        {"X-Long": "a" * 200_000},
        {"X Space": "a"},
        {"X-Nul": "a\0b"},
        {"": "x"},
        {"X-Line\n": "x"},
    ]
    for headers in wrong:
        name = str({key: value[:20] for key, value in headers.items()})
        yield Case("header", name, request_bytes("POST", CHAT, data, headers))
    good = request_bytes("POST", CHAT, data)
    first = good.split(b"\r\n", 1)[0]
    lines = [b"POST", b"POST /v1/chat/completions", b"\0" * 40]
    lines += [
        b"POST / v1 HTTP/1.1",
        b"GET http://[::1 HTTP/1.1",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc",
    ]
    lines += [b"GET /" + b"a" * 100_000 + b" HTTP/1.1", b"PRI * HTTP/2.0", b"GET \xff\xfe HTTP/1.1"]
    for line in lines:
        yield Case("line", repr(line[:30]), good.replace(first, line))
    twice = good.replace(b"Content-Length", b"Content-Length: 3\r\nContent-Length")
    yield Case("header", "two lengths", twice)
    many = {f"X-{n}": "a" * 100 for n in range(2000)}
    yield Case("header", "two thousand headers", request_bytes("POST", CHAT, data, many))
    chunked = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    for chunk in (b"zz\r\n{}\r\n", b"-1\r\n{}\r\n", b"f" * 40 + b"\r\n{}\r\n"):
        yield Case("header", repr(chunk[:12]), request_bytes("POST", CHAT, b"", chunked) + chunk)


def adapter_paths() -> Iterator[Case]:
    """Adapters from where there are none, and unknown ones."""
    paths = ["/nowhere", "../../../etc", "/etc", "/etc/passwd", "/proc/self", "/proc/self/mem"]
    paths += [
        "/dev/zero",
        "/dev/stdin",
        "",
        ".",
        "~",
        "\0",
        "a\0b",
        "x" * 5000,
        "hub/id",
        "file:///etc",
    ]
    paths += [
        "http://127.0.0.1/adapter",
        "\\\\host\\share",
        1,
        None,
        ["/etc"],
        {},
        Raw('"\\ud800"'),
    ]
    for path in paths:
        yield posted("adapter", f"path = {str(path)[:30]!r}", ADAPTERS, body(ADAPTERS, path=path))
    yield posted("adapter", "a field more", ADAPTERS, body(ADAPTERS, allow_other_base=1, trust=1))
    for name in ("none", "tiny", "..", "%2e%2e%2ftask0", "%00", "task0/..", ""):
        yield Case("adapter", f"DELETE {name}", request_bytes("DELETE", f"{ADAPTERS}/{name}"))


def adapter_names(path: str) -> Iterator[Case]:
    """The adapter of a directory, under names that are none and names that are taken."""
    names = ["", "task0", "tiny", "base", "../x", "a/b", ".", "..", "a\nb", "\0", "\u202e"]
    for name in [*names, " ", "x" * 5000, 1, None, []]:
        data = body(ADAPTERS, name=name, path=path)
        yield posted("adapter", f"name = {str(name)[:30]!r}", ADAPTERS, data)


def half_requests() -> Iterator[Case]:
    """Requests that stop: some with the client's end behind them, some that only wait."""
    whole = request_bytes("POST", CHAT, body(CHAT))
    for share in (0.1, 0.5, 0.9):
        yield Case(
            "half",
            f"{share:.0%}, then its end",
            whole[: int(len(whole) * share)],
            ends=True,
            no_request=True,
        )
    yield Case("half", "a head that never ends", whole[:60], slow=True, no_request=True)
    yield Case("half", "the body's last byte never comes", whole[:-1], slow=True)
    chunked = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    begun = request_bytes("POST", CHAT, b"", chunked) + b"5\r\n{\r\n"
    yield Case("half", "a chunk that never ends", begun, slow=True)


KEYED = (
    wrong_types,
    broken_json,
    unknown_models,
    methods_and_paths,
    bad_headers,
    adapter_paths,
    half_requests,
)

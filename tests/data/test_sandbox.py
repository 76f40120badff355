"""Templates run in a sandbox: what upstream writes, and nothing that takes too long or too much."""

import json
import subprocess
import sys

import pytest
from chat_tokenizer import chat_tokenizer

from qlora_kit.data import chat_template as sandbox
from qlora_kit.data.chat_template import render, template_names, use_template
from qlora_kit.data.encode import encode
from qlora_kit.data.rows import Row
from qlora_kit.errors import (
    ConfigError,
    DataError,
    QloraKitError,
    TokenizerError,
    UnsafeInputError,
)

MESSAGES = [
    {"role": "user", "content": " he <b> 'é' 🙂 "},
    {"role": "assistant", "content": "hello"},
]


def written(template, **variables):
    return render(template, "x.jsonl:1", {"messages": MESSAGES, **variables}, 100)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}",
        "{%- for m in messages -%}\n  {{- m | tojson }}\n{%- endfor %}\n",
        "{{ messages | tojson(indent=2) }}{{ messages[0] | length }}",
        "{% macro f(x) %}<{{ x ~ 1 }}>{% endmacro %}{% for m in messages %}{{ f(m.role) }}"
        "{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n * 3 - 2 ** 2 }}{{ 'ab' * 3 }}{{ '%s!' % 'x' }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
        "{% break %}{% endfor %}",
        "{% set x %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ x | upper }}",
        "{{ messages[0].content.split('é')[0].strip().replace('he', 'she') }}",
        "{{ ', '.join(['a', 'b']) }}{{ messages | map(attribute='role') | join('-') }}",
        "{% for m in messages recursive %}{{ m.role }}{% endfor %}{{ dict(a=1) | tojson }}",
        "{{ raise_exception if false else 'x' }}{{ strftime_now('%%') }}{{ undefined_name }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
    ],
)
def test_a_template_writes_what_upstream_writes(template):
    tokenizer = chat_tokenizer()
    upstream = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    ours = written(template, **tokenizer.special_tokens_map)
    assert ours.replace(sandbox.OPEN, "").replace(sandbox.CLOSE, "") == upstream


TOO_LONG = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a loop over a filter": (
        "{% for a in range(9999) %}{% set x = range(9999) | list | sort %}{% endfor %}"
    ),
    "macros that call macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    ),
}
TOO_LARGE = {
    "a product": "{{ 'x' * 1000000000000 }}",
    "a product the other way round": "{{ 1000000000000 * ['x'] }}",
    "a power": "{{ 9 ** 9999999 ** 9 }}",
    "sums": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}",
    "joined": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "captured": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}"
    "{{ n.s }}{% endset %}{% endfor %}",
    "joined by a method": "{{ ('x' * 100000).join(range(99999) | map('string') | list) }}",
    "joined by a filter": "{{ range(99999) | list | join('x' * 100000) }}",
    "replaced": "{{ ('x' * 100000).replace('x', 'x' * 100000) }}",
    "replaced by a filter": "{{ ('x' * 100000) | replace('x', 'x' * 100000) }}",
    "a width": "{{ 'x'.ljust(1000000000000) }}",
    "a width in a filter": "{{ 'x' | center(1000000000000) }}",
    "a width in a format": "{{ '%1000000000d' % 1 }}",
    "a width in another format": "{{ '{:1000000000}'.format(1) }}",
    "numbers": "{% set x = 9**1000 %}{% set y = x**1000 %}{% set z = y**1000 %}",
    "rounded": "{% set x = 1.5 | round(300000000, 'ceil') %}",
    "a nested width": "{% set x = '{:>{w}}'.format('a', w=3000000000) %}",
    "a width beside": "{% set x = '%*d' % (3000000000, 1) %}",
    "an indent": "{% set x = [1] | tojson(indent=3000000000) %}",
    "translated": "{% set x = ('a' * 900000).translate({97: 'b' * 100000}) %}",
    "bytes": "{% set x = 'a'.encode() * 3000000000 %}",
    "a value of values": "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
    "{% set ns.x = dict(ns.x, **{'k' ~ i: ns.x}) %}{% endfor %}{{ ns.x | tojson }}",
    "a list of texts": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = n.x + ['x' * 999999 ~ i] %}{% endfor %}",
    "constants": "{{ " + "'x' ~ " * 99 + "'y' * 10**10 }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "nested calls": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{{ "
    + "d(" * 40 + "'x'" + ")" * 40 + " }}",
}  # fmt: skip
UNSAFE = {
    "private attributes": "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1]() }}",
    "code of functions": "{{ raise_exception.__globals__['json'] }}",
    "changing the messages": "{{ messages.append(1) }}",
    "private names in a namespace": "{% set n = namespace(_x=1) %}",
    "an endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_a_template_that_runs_too_long_is_stopped(what, monkeypatch):
    monkeypatch.setattr(sandbox, "TIME_LIMIT_S", 0.3)
    with pytest.raises(UnsafeInputError, match=r"x.jsonl:1: .*longer than 0.3 s"):
        written(TOO_LONG[what])
    assert written("{{ messages[0].role }}") == "user"


ONE_BY_ONE = """
import json, resource, sys
from qlora_kit.data import chat_template as sandbox
sandbox.TIME_LIMIT_S = 0.5
given = json.loads(sys.stdin.read())
for what, template in given["templates"].items():
    try:
        said = sandbox.render(template, "x.jsonl:1", {"messages": given["messages"]}, 100)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    after = sandbox.render("{{ messages[0].role }}", "x.jsonl:2", given, 100)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([what, said[:200], after, largest]))
"""


@pytest.fixture(scope="module")
def too_large():
    """What each template of TOO_LARGE gives, what the next one writes, and the largest child.

    In a small process of its own: a child counts what its parent held when it was started.
    """
    given = json.dumps({"templates": TOO_LARGE, "messages": MESSAGES})
    command = [sys.executable, "-c", ONE_BY_ONE]
    ended = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return {what: rest for what, *rest in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_template_that_makes_too_much_is_stopped(what, too_large):
    said, after, largest_kib = too_large[what]
    assert said.startswith("UnsafeInputError: x.jsonl:1: the chat template was stopped")
    assert largest_kib < 2**20
    assert after == "user"


@pytest.mark.parametrize("what", UNSAFE)
def test_a_template_does_not_leave_the_sandbox(what):
    with pytest.raises(QloraKitError, match=r"x.jsonl:1: the chat template"):
        written(UNSAFE[what])
    assert len(MESSAGES) == 2


def test_the_limit_on_size_grows_with_the_messages():
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(render("{{ messages[0].content }}", "x", {"messages": long}, 3_000_000)) == 3_000_000


def test_a_row_meets_the_limits_too(monkeypatch):
    monkeypatch.setattr(sandbox, "TIME_LIMIT_S", 0.2)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOO_LONG["nested loops"]
    with pytest.raises(UnsafeInputError, match=r"rows.jsonl:3: .*longer than 0.2 s"):
        encode(Row({"messages": MESSAGES}, "rows.jsonl", 3), tokenizer, 100)


# --- names and files ------------------------------------------------------------------------------


def test_a_template_is_used_by_name_or_from_a_file(tmp_path):
    assert template_names() == ["alpaca", "chatml", "llama-2", "llama-3", "plain"]
    tokenizer = chat_tokenizer()
    for name in template_names():
        use_template(tokenizer, name)
        assert "hello" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    use_template(tokenizer, str(path))
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused():
    tokenizer = chat_tokenizer()
    small = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(TokenizerError, match="llama-2: the tokenizer has no eos_token"):
        use_template(small, "llama-2")
    backend = tokenizer.backend_tokenizer
    without = backend.to_str().replace("im_start", "im_stort")
    other = type(tokenizer)(tokenizer_object=type(backend).from_str(without), eos_token="</s>")
    with pytest.raises(TokenizerError, match=r"chatml: the tokenizer has no <\|im_start\|>; use"):
        use_template(other, "chatml")
    assert not other.chat_template
    use_template(other, "plain")


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (None, ConfigError, "neither a file nor one of ours.*alpaca, chatml"),
        (b"{% for %}", TokenizerError, "no Jinja template: line 1"),
        (b"\xff", DataError, "own.jinja:1: byte offset 0 is not UTF-8"),
        (b"x" * (2**20 + 1), DataError, "own.jinja:1: the template is larger than 1 MiB"),
        ("folder", UnsafeInputError, "is no plain file"),
    ],
)
def test_a_template_that_cannot_be_read_is_named(tmp_path, content, error, reason):
    path = tmp_path / "own.jinja"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    tokenizer = chat_tokenizer()
    with pytest.raises(error, match=reason):
        use_template(tokenizer, str(path))
    assert not tokenizer.chat_template

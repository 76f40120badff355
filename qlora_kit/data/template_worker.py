"""The process that runs chat templates; `sandbox.py` starts it and asks.

It gives a template what transformers gives it (`tojson`, `raise_exception`, `strftime_now`, the
marks of `{% generation %}`, loop controls), so that it writes what `apply_chat_template` writes.
Limits are the system's: a timer of this process's time ends it, and its address space is bounded.
The one check here is on the length of what is written.

A message is its length in eight bytes and JSON. Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

OPEN, CLOSE = "\ue000", "\ue001"
"""Marks around generated text, as in `sandbox.py`."""

IDLE_S = 60.0
"""Without a question the process ends: a run encodes its rows once, and then trains for hours."""

MESSAGE = 500
"""Characters of an error that a template raises."""


def serve() -> None:
    """Answer until the other process goes, or asks nothing for a while."""
    known: dict[int, str] = {}
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while select.select([source], [], [], IDLE_S)[0]:
        head = source.read(8)
        if len(head) < 8:
            return
        content = source.read(*struct.unpack(">Q", head))
        try:
            asked = json.loads(content)
            if asked["template"] is not None:
                known[asked["number"]] = asked["template"]
            _limit(asked["seconds"], asked["memory"])
            answer = {"result": _answer(known[asked["number"]], asked)}
        except BaseException as error:
            answer = _refusal(error)
        del content
        _limit(0, resource.RLIM_INFINITY)
        reply = json.dumps(answer).encode()
        target.write(struct.pack(">Q", len(reply)) + reply)
        target.flush()


def _limit(seconds: float, memory: int) -> None:
    """Let this process live so long, of the processor's time, and have so much address space."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bounded = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    soft = hard if memory == resource.RLIM_INFINITY else bounded
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(template: str, asked: dict[str, Any]) -> Any:
    if asked["do"] == "describe":
        _compiled(template)
        tree = _Environment().parse(template)
        data = [node.data for node in tree.find_all(nodes.TemplateData)]
        data += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
        variables = jinja2.meta.find_undeclared_variables(tree)
        return {"literal": "\0".join(data), "variables": sorted(variables)}
    program = _compiled(template)
    for message in asked["variables"].get("messages", ()):
        for call in message.get("tool_calls") or ():
            function = call.get("function", {})
            if isinstance(function.get("arguments"), dict):
                function["arguments"] = _Arguments(function["arguments"])
    now = datetime.fromisoformat(asked["date"])
    pieces, size = [], 0
    for piece in program.generate(
        **asked["variables"], strftime_now=lambda format: now.strftime(format)
    ):
        pieces.append(piece)
        size += len(piece)
        if size > asked["size"]:
            raise _LimitError(f"it writes a text of more than {asked['size']} characters")
    return "".join(pieces)


def _refusal(error: BaseException) -> dict[str, str]:
    """What is said of a template that did not run to its end."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"kind": "syntax", "message": f"line {error.lineno}: {error}"[:MESSAGE]}
    if isinstance(error, (MemoryError, SystemError)):  # the latter where C has no memory
        return {"kind": "stopped", "message": "it takes more memory than a template may have"}
    if isinstance(error, (_LimitError, SecurityError, RecursionError)):
        return {"kind": "stopped", "message": f"{error or type(error).__name__}"[:MESSAGE]}
    # A template raises what it likes, often on purpose.
    return {"kind": "refused", "message": str(error)[:MESSAGE]}


class _LimitError(Exception):
    """A template wrote more than it may."""


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _Namespace._check(name)
        Namespace.__init__(self, *rest, **kwargs)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")


class _Arguments(dict[str, Any]):
    """Arguments of a call: an object, which is its JSON where a template takes it for text.

    Most templates write it through `tojson`, but some were made for the text that OpenAI's API
    gives, and join it to others (DeepSeek) or write it as it is, which Python would do its own way.
    """

    def __str__(self) -> str:
        return _to_json(self)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates."""

    # Constants are computed where the template runs, not while it is compiled.
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }


class _Generation(Extension):
    """`{% generation %}`."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """The block's text between its marks."""
        return OPEN + caller() + CLOSE


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

"""What runs chat templates, in the process of `process/worker.py`; `chat_template.py` asks.

It gives a template what transformers gives it (`tojson`, `raise_exception`, `strftime_now`, the
marks of `{% generation %}`, loop controls), so that it writes what `apply_chat_template` writes.
The one limit that is checked here is that on the length of what is written.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
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
"""Marks around generated text, as in `chat_template.py`."""

MESSAGE = 500
"""Characters of an error that a template raises."""


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What a template writes or holds, or why it did not run to its end. Errors: want of memory."""
    try:
        if asked["do"] == "describe":
            return {"result": _described(asked["template"])}
        return {"result": _rendered(asked)}
    except (MemoryError, SystemError):
        raise
    except BaseException as error:
        return _refusal(error)


def _described(template: str) -> dict[str, Any]:
    _compiled(template)
    tree = _Environment().parse(template)
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    data += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    variables = jinja2.meta.find_undeclared_variables(tree)
    return {"literal": "\0".join(data), "variables": sorted(variables)}


def _rendered(asked: dict[str, Any]) -> str:
    program = _compiled(asked["template"])
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

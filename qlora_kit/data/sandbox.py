"""Chat templates run in a sandbox, with limits on time and on the size of any text.

A template is a program out of a file. It runs in Jinja's immutable sandbox with what transformers
gives it (`tojson`, `raise_exception`, `strftime_now`, `{% generation %}`, loop controls), so that
it writes what `apply_chat_template` writes. Beyond that every loop, macro, call and filter looks
at the clock, and every product, sum and result is measured, those that could be huge before they
are made.

`{% generation %}` writes two marks around its text, which `mask.py` takes out again: that finds
the place also inside macros and captured blocks.

Sources: transformers' `chat_template_utils.py` (5.x); Jinja 3.1, "Sandbox".
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qlora_kit.errors import DataError, TokenizerError, UnsafeInputError

TIME_LIMIT_S = 5.0
"""Of one rendering, in seconds of this thread."""

SIZE_LIMIT = 1024**2
"""Characters of any text that a template makes, beyond ten times its input's."""

WIDTHS = {"batch", "center", "expandtabs", "indent", "lipsum", "ljust", "rjust", "slice", "zfill"}
"""Filters and methods of text that make as much as a number says."""

OPEN, CLOSE, LITERAL = "\ue000", "\ue001", "\ue002"
"""Marks around generated text, and around the numbers that stand for control tokens in messages.

Private characters; `mask.py` hides those that a message holds itself.
"""


def today() -> str:
    """This day, as templates are told it: 2026-01-31."""
    return datetime.now().date().isoformat()


def render(
    template: str,
    where: str,
    variables: Mapping[str, Any],
    input_size: int,
    date: str | None = None,
) -> str:
    """What a template writes; `input_size` is the number of characters in its messages.

    `date` is what the template gets for now: the midnight at which that day begins; None: today.

    Errors: `UnsafeInputError` beyond the limits or out of the sandbox, `DataError` where the
    template refuses the messages, `TokenizerError` where it is no template.
    """
    program = check_template(template, where)
    limits = program.environment.limits  # type: ignore[attr-defined]
    limits.start(10 * input_size + SIZE_LIMIT)
    program.environment.now = datetime.fromisoformat(date or today())  # type: ignore[attr-defined]
    try:
        pieces, size = [], 0
        for piece in program.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            limits.check(size)
        return "".join(pieces)
    except (_LimitError, SecurityError, RecursionError, MemoryError) as error:
        raise UnsafeInputError(
            f"{where}: the chat template was stopped: {error or type(error).__name__}",
            "use another template (--chat_template)",
        ) from error
    except Exception as error:
        # A template raises what it likes, often on purpose.
        raise DataError(
            f"{where}: the chat template refuses the messages: {error}",
            "give the order and the roles that the model was made for",
        ) from error


def check_template(template: str, where: str) -> jinja2.Template:
    """The program of a template's text. Errors: `TokenizerError` for what is no template."""
    try:
        return _compiled(template)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise TokenizerError(
            f"{where}: the chat template is no Jinja template: line {line}: {error}",
            "correct it, or use another (--chat_template)",
        ) from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


@functools.lru_cache(maxsize=8)
def literal_text(template: str) -> str:
    """Everything that a template itself can write, the pieces apart."""
    tree = _parsed(template)
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*data, *constants])


@functools.lru_cache(maxsize=8)
def variables_of(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself everywhere."""
    return frozenset(jinja2.meta.find_undeclared_variables(_parsed(template)))


def _parsed(template: str) -> nodes.Template:
    return ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols]).parse(template)


class _LimitError(Exception):
    """A template asked for more time or text than it may have."""


class _Limits:
    """The clock and the largest size of the rendering that goes on."""

    def __init__(self) -> None:
        self.start(SIZE_LIMIT)

    def start(self, size: int) -> None:
        self.size, self._end = size, time.thread_time() + TIME_LIMIT_S

    def tick(self) -> str:
        if time.thread_time() > self._end:
            raise _LimitError(f"it ran longer than {TIME_LIMIT_S:g} s")
        return ""

    def check(self, size: float) -> None:
        self.tick()
        if size > self.size:
            raise _LimitError(f"it writes a text of more than {self.size} characters")

    def result(self, value: Any) -> Any:
        """The value, once it is known to be small enough."""
        self.check(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
        return value

    def arguments(self, name: str, values: Iterable[Any]) -> None:
        """Refuse what could make a huge text out of small arguments, before it is made."""
        given = list(values)
        for value in given if name in WIDTHS else ():
            if isinstance(value, int):
                self.check(abs(value))
        texts = [value for value in given if isinstance(value, str)]
        if name == "replace" and len(texts) >= 3:
            self.check(len(texts[0]) / max(1, len(texts[1])) * len(texts[2]))
        if name == "join" and texts:
            other = max((len(v) for v in given if isinstance(v, (list, tuple))), default=0)
            self.check(max(other, len(texts[0])) * max(map(len, texts)))
        if name in ("format", "format_map", "%") and re.search(r"\d{6}", texts[0] if texts else ""):
            raise _LimitError("it formats a number with a huge width")


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


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, with limits."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        self.limits, self.now = _Limits(), datetime.now()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: self._limited(name, f) for name, f in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: self.now.strftime(format),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.limits.arguments(name, [*args, *kwargs.values()])
            return self.limits.result(function(*args, **kwargs))

        return limited

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = super()._parse(source, name, filename)
        return _AddLimits().visit(tree)  # type: ignore[no-any-return]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        __self.limits.arguments(getattr(__obj, "__name__", ""), [owner, *args, *kwargs.values()])
        return __self.limits.result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else None for v in (left, right)]
        if operator == "*" and sizes != [None, None]:
            # One side is a text or list, the other says how often.
            times = max((v for v in (left, right) if isinstance(v, int)), default=0)
            self.limits.check((sizes[0] or sizes[1] or 0) * times)
        elif operator == "+" and None not in sizes:
            self.limits.check(sum(size for size in sizes if size is not None))
        elif operator == "**":
            self.limits.check(abs(right) * 1000 if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            self.limits.arguments("%", [left])
        return self.limits.result(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """`{% generation %}`, and the calls that `_AddLimits` puts into a template."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """The block's text between its marks."""
        return OPEN + caller() + CLOSE

    def tick(self) -> str:
        """Look at the clock."""
        return str(self.environment.limits.tick())  # type: ignore[attr-defined]

    def concat(self, *values: Any) -> str:
        """Jinja's `~`."""
        return "".join(map(str, values))

    def measure(self, value: Any) -> Any:
        """A value that was set, once it is known to be small enough."""
        return self.environment.limits.result(value)  # type: ignore[attr-defined]


class _AddLimits(NodeTransformer):
    """Puts a look at the clock into every loop and macro, and at the size of what is joined."""

    def _ticked(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_method("tick")).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticked  # noqa: N815

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        """`a ~ b` becomes a call, whose result is measured."""
        self.generic_visit(node)
        return _method("concat", node.nodes).set_lineno(node.lineno)

    def visit_AssignBlock(self, node: Any) -> Any:  # noqa: N802
        """What a block is captured into is measured."""
        self.generic_visit(node)
        target = node.target
        value: nodes.Expr
        if isinstance(target, nodes.NSRef):
            value = nodes.Getattr(nodes.Name(target.name, "load"), target.attr, "load")
        else:
            value = nodes.Name(target.name, "load")
        return [node, nodes.ExprStmt(_method("measure", [value])).set_lineno(node.lineno)]


def _method(name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Call:
    method = nodes.ExtensionAttribute(_Generation.identifier, name)
    return nodes.Call(method, arguments or [], [], None, None)


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

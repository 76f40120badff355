"""The one place through which everything that a command prints goes.

Texts come from rows, models, file names and answers, and a terminal obeys some characters: what is
printed here holds none of them, no secret, and no markup of its own. JSON is ASCII, so that it is
JSON in every encoding. What happens when the stream cannot be written to is `streams`' part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qlora_kit.errors import redacted
from qlora_kit.options.checks import size_text
from qlora_kit.process.streams import plain

LABEL = 9
"""Characters of the label in front of a line."""


class Terminal:
    """Standard output or error, with styles on a terminal; or a record of what would be there."""

    def __init__(self, *, record: bool = False, stderr: bool = False) -> None:
        self.console = _PlainConsole(record=record, stderr=stderr)

    @property
    def is_live(self) -> bool:
        """Whether it can be drawn over: no pipe, no notebook, whatever colours are asked for."""
        console = self.console
        return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()

    @property
    def has_colour(self) -> bool:
        """Whether styles are seen."""
        return self.console.is_terminal and not self.console.no_color

    @property
    def width(self) -> int:
        """Characters of a line."""
        return self.console.width

    def print(self, *parts: str | tuple[str, str], end: str = "\n", wrapped: bool = False) -> None:
        """One text of several parts, each a text or a (text, style); `wrapped` between words."""
        self.console.print(_styled(*parts), end=end, soft_wrap=not wrapped)

    def line(self, label: str, *parts: str | tuple[str, str], width: int = LABEL) -> None:
        """`label`, then a text of several parts."""
        self.print((f"{label:<{width}}", "bold"), " ", *parts)

    def note(self, text: str, indent: str = "") -> None:
        """One line that the reader should not miss."""
        self.print(indent, ("note:", "yellow"), " ", text)

    def show(self, renderable: ConsoleRenderable) -> None:
        """A table or another of rich's renderables."""
        self.console.print(renderable)

    def json(self, value: object, indent: int | None = None) -> None:
        """`value` as JSON in ASCII; nothing is redacted, for what is data stays data."""
        text = json.dumps(value, indent=indent)
        self.console.file.write(text.replace("\x7f", "\\u007f") + "\n")
        self.console.file.flush()

    def stream(self, piece: str) -> None:
        """A piece of an answer, shown at once; a file or a pipe gets it as it is."""
        self.console.file.write(plain(piece) if self.console.file.isatty() else piece)
        self.console.file.flush()


def _styled(*parts: str | tuple[str, str]) -> Text:
    """A text of several parts, each a text or a (text, style), with no secret."""
    text = Text()
    for part in parts:
        said, style = (part, "") if isinstance(part, str) else part
        text.append(plain(redacted(said)), style)
    return text


def size(n: int) -> str:
    """Bytes as they are shown."""
    return size_text(n)


def table_of(*titles: str, left: Collection[str] = (), title: str | None = None) -> Table:
    """A table without rows and without an edge; columns are flush right but for those `left`."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for one in titles:
        table.add_column(one, justify="left" if one in left else "right")
    return table


class _PlainConsole(Console):
    """A console without markup of its own, whose every text is plain, cells of tables too.

    With `record` nothing is printed, and `export_html` has it in colour, whatever the terminal is.
    """

    def __init__(self, *, record: bool, stderr: bool) -> None:
        recorded: dict[str, Any] = {"stderr": stderr}
        if record:
            recorded = {"file": io.StringIO(), "force_terminal": True, "color_system": "truecolor"}
            recorded |= {"no_color": False, "record": True}
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **recorded)
        self.push_render_hook(_Plain())

    def on_broken_pipe(self) -> None:
        """Rich's own would end the process, with exit code 1."""
        raise


class _Plain(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PlainRenderable(one) for one in renderables]


class _PlainRenderable:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(plain(segment.text), segment.style)

"""Rich's console where nothing that is printed holds a character that a terminal obeys."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from qlora_kit.process.streams import plain


class PlainConsole(Console):
    """A console without markup of its own, whose every text is plain, cells of tables too.

    With `record` nothing is printed, and `export_html` has it in colour, whatever the terminal is.
    """

    def __init__(self, *, record: bool = False, stderr: bool = False) -> None:
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

"""A chat on a terminal, or in a pipe: reads lines, shows what comes of them.

Who types has a prompt with the name of who answers, the lines of before (readline), and goes on
after an error or a ^C. In a pipe there is no prompt, answers are all that standard output has, an
empty line between two, and an error is the end. Two answers stand in columns where a terminal is
wide enough and can be drawn over, else one below the other.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.failure import stands_for
from qlora_kit.commands.terminal import Terminal
from qlora_kit.errors import DataError, QloraKitError, error_line
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.process.streams import note
from qlora_kit.run.chat_events import Began, Ended, Left, Note, Piece

if TYPE_CHECKING:
    from qlora_kit.run.chat_lines import Lines

WIDE = 72
"""Characters of a terminal in which two columns can be read."""
LIMIT = 16 * 1024**2
"""Bytes of one line of a pipe: as many as a row of data may have."""
REDRAW_S = 0.1


class ChatScreen:
    """A chat as it is typed and seen."""

    def __init__(self, lines: Lines) -> None:
        self._lines, self._terminal = lines, Terminal()
        self._is_typed = sys.stdin.isatty()
        self._notes = self._terminal if sys.stdout.isatty() else Terminal(stderr=True)
        self._is_first = True

    def run(self) -> int:
        """Go on until the chat is left; the exit code."""
        if self._is_typed:
            _remember_lines(self._lines)
            self._note(f"{self._lines.described}; /help lists commands, ^D leaves")
        if self._lines.note is not None:
            self._note(self._lines.note)
        is_second = False
        with StopSignals() as signals:
            while True:
                line = None
                try:
                    line = self._line()
                    is_second = False
                    if line is None or self._show(line):
                        return 0
                except Stopped as stop:
                    if stop.signal_number != signal.SIGINT or not self._is_typed:
                        raise
                    signals.forget()
                    if line is None:
                        self._notes.stream("\n")  # the prompt's line
                        if _is_begun():
                            continue
                    if is_second:
                        return stop.exit_code
                    is_second = True
                    self._note("^C again leaves" if line is None else "stopped; ^C again leaves")
                except BrokenPipeError:
                    raise  # whoever read the answers has left
                except Exception as error:
                    failure = stands_for(error, "chat")
                    if not self._is_typed or type(failure) is QloraKitError:
                        raise
                    self._notes.print((error_line(failure), "red"), wrapped=True)

    def _show(self, line: str) -> bool:
        """Show what comes of a line; whether it leaves the chat."""
        view: _Below | _Columns | None = None
        events = self._lines.hear(line)
        try:
            for event in events:
                match event:
                    case Began(names):
                        view = self._view(names)
                    case Piece(place, text) if view is not None:
                        view.piece(place, text)
                    case Ended(place, why) if view is not None:
                        view.ended(place, why)
                    case Note(text):
                        self._note(text)
                    case Left():
                        return True
        finally:
            # What has come of an answer is kept now, and not when the generator is collected.
            events.close()
            if view is not None:
                view.close()
        return False

    def _view(self, names: tuple[str, ...]) -> _Below | _Columns:
        if not self._is_typed and not self._is_first:
            self._terminal.stream("\n")
        self._is_first = False
        is_wide = self._terminal.is_live and self._terminal.console.width >= WIDE
        kind = _Columns if len(names) > 1 and is_wide else _Below
        return kind(self._terminal, names, self._note)

    def _note(self, text: str) -> None:
        if self._is_typed:
            self._notes.print((text, "dim"), wrapped=True)
        else:
            note(text)

    def _line(self) -> str | None:
        """The next line, with those that it goes on in; None at the end."""
        parts: list[str] = []
        prompt = f"{self._lines.name}> "
        while (line := self._typed(prompt) if self._is_typed else _piped()) is not None:
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])
            prompt = "... "
        return "\n".join(parts) if parts else None

    def _typed(self, prompt: str) -> str | None:
        if not sys.stdout.isatty():
            # Python would write the prompt among the answers.
            self._notes.stream(prompt)
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            self._notes.stream("\n")
            return None
        except UnicodeDecodeError as error:
            raise DataError("the line is not UTF-8", "use a terminal in UTF-8") from error


def _piped() -> str | None:
    raw = sys.stdin.buffer.readline(LIMIT + 1)
    if len(raw) > LIMIT:
        raise DataError(
            f"standard input: a line has more than {LIMIT // 1024**2} MiB", "send a shorter one"
        )
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n") if raw else None
    except UnicodeDecodeError as error:
        raise DataError("standard input: a line is not UTF-8", "send UTF-8") from error


def _remember_lines(lines: Lines) -> None:
    """Let `input` edit lines, give those of before, and complete commands."""
    with contextlib.suppress(ImportError):
        import readline

        def completed(begun: str, number: int) -> str | None:
            found = lines.completions(begun)
            return found[number] if number < len(found) else None

        readline.set_completer_delims("")
        readline.set_completer(completed)
        readline.parse_and_bind("tab: complete")


def _is_begun() -> bool:
    """Whether a line is half typed, which a ^C drops."""
    readline = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer())


class _Below:
    """Answers one below the other, of which the first that has not ended is seen as it comes."""

    def __init__(self, terminal: Terminal, names: tuple[str, ...], note: Any) -> None:
        self._terminal, self._names, self._note = terminal, names, note
        self._texts, self._whys = [""] * len(names), dict[int, str | None]()
        self._shown, self._is_open = 0, True
        self._head()

    def piece(self, place: int, text: str) -> None:
        """More of an answer."""
        self._texts[place] += text
        if place == self._shown:
            self._terminal.stream(text)

    def ended(self, place: int, why: str | None) -> None:
        """One is whole."""
        self._whys[place] = why
        while self._shown in self._whys:
            self._end(self._whys[self._shown])
            self._shown += 1
            if self._shown == len(self._names):
                self._is_open = False
                return
            self._head()
            self._terminal.stream(self._texts[self._shown])

    def close(self) -> None:
        """No more comes."""
        if self._is_open:
            self._is_open = False
            self._end(None)
            for name, text in list(zip(self._names, self._texts, strict=True))[self._shown + 1 :]:
                self._terminal.stream(f"{name}:\n{text}\n")

    def _head(self) -> None:
        if len(self._names) > 1:
            self._terminal.print((f"{self._names[self._shown]}:", "bold"))

    def _end(self, why: str | None) -> None:
        self._terminal.stream("\n")
        if why is not None:
            self._note(f"({why})")


class _Columns:
    """Answers side by side, drawn over as they come."""

    def __init__(self, terminal: Terminal, names: tuple[str, ...], note: Any) -> None:
        from rich.live import Live

        self._names, self._texts, self._whys = names, [""] * len(names), [""] * len(names)
        self._console, self._drawn_s = terminal.console, 0.0
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._table,
        )
        self._live.start()

    def piece(self, place: int, text: str) -> None:
        """More of an answer."""
        self._texts[place] += text
        if time.monotonic() - self._drawn_s >= REDRAW_S:
            self._live.refresh()
            self._drawn_s = time.monotonic()

    def ended(self, place: int, why: str | None) -> None:
        """One is whole."""
        self._whys[place] = f"({why})" if why else ""

    def close(self) -> None:
        """No more comes."""
        self._live.stop()

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        # A terminal writes ^C where the cursor is: there must be room for it on the last line.
        width = self._console.width - len("^C") - 1
        table = Table(box=None, width=width, padding=(0, 2, 0, 0), header_style="bold")
        for name in self._names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, self._texts))
        if any(self._whys):
            table.add_row(*(Text(why, "dim") for why in self._whys))
        return table

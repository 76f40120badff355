"""Standard output and error that fail no command, and text that does nothing to a terminal.

While a command runs, `sys.stdout` and `sys.stderr` are wrapped. A character that the stream's
encoding lacks is written as a replacement. A stream that is closed, full, or whose reader left is
written to no more. What that means is the command's to say: for one whose product is what it
prints, the first failed write raises; for one that leaves files, training goes on without a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

JOINERS = "\u200c\u200d"
"""Format characters that words and emoji of everyday texts have inside."""
CURSOR_UP = "\x1b[A"
"""What progress bars of other libraries move by, on stderr."""


def plain(text: str, keep: str = "\n\t") -> str:
    r"""`text` with nothing that a terminal obeys: such characters become their escapes (`\x1b`).

    Those are control characters but the ones in `keep`, characters that turn the direction of
    writing or are not seen, and the lone surrogates of file names that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _is_shown(c) else ascii(c)[1:-1] for c in text)


def _is_shown(character: str) -> bool:
    spaced = unicodedata.category(character) == "Zs"
    return character.isprintable() or spaced or character in JOINERS


def note(text: str) -> None:
    """One line on standard error that a reader should not miss; nothing waits for it."""
    print(f"note: {text}", file=sys.stderr)


class Stream:
    """A text stream that is written to for as long as that works.

    `required` says that the first write that fails raises its `OSError`; `lost` keeps it.
    """

    def __init__(self, stream: Any, *, required: bool, error: bool) -> None:
        self._stream, self._is_error = stream, error
        self.required = required
        self.lost: OSError | None = None
        self.settled = False
        """Whether a command inside has answered for the loss."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or what the encoding has of it."""
        if self.lost is None:
            if self._is_error:
                text = CURSOR_UP.join(plain(part, "\n\t\r") for part in text.split(CURSOR_UP))
            try:
                self._write(text)
            except (OSError, ValueError) as error:  # a closed file raises a ValueError
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what is held back."""
        if self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _lose(self, error: OSError | ValueError) -> None:
        # What the stream holds back would fail once more when Python ends.
        with contextlib.suppress(OSError, ValueError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self._stream.fileno())
            os.close(handle)
        self.lost = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        if self.required:
            raise self.lost
        if not self._is_error and not isinstance(error, BrokenPipeError):
            note(f"{self.problem}; going on without it")

    @property
    def problem(self) -> str:
        """What is wrong with the stream, which was lost."""
        return f"standard output (stdout): {self.lost and self.lost.strerror}"


@contextlib.contextmanager
def guarded(required: bool) -> Iterator[Stream]:
    """Wrap both streams; gives stdout, which raises where it is `required`.

    Inside another one the streams stay wrapped as they are.
    """
    _open_closed()
    out, err = sys.stdout, sys.stderr
    if isinstance(out, Stream):
        before, out.required = out.required, required
        try:
            yield out
        finally:
            out.required, out.settled = before, out.lost is not None
        return
    wrapped = Stream(out, required=required, error=False)
    other = Stream(err, required=False, error=True)
    blocking = [_set_blocking(stream, True) for stream in (out, err)]
    sys.stdout, sys.stderr = wrapped, other  # type: ignore[assignment]
    try:
        yield wrapped
    finally:
        other.flush()
        sys.stdout, sys.stderr = out, err
        for stream, was in zip((out, err), blocking, strict=True):
            if was is not None:
                _set_blocking(stream, was)


def _open_closed() -> None:
    """Point standard streams that are closed at nothing, so that no file of ours takes their place.

    A library that prints would else write into the first file that is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _set_blocking(stream: TextIO, blocking: bool) -> bool | None:
    """Let writes wait for a slow reader; what it was before, None where it was that already."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        if os.get_blocking(number) is not blocking:
            os.set_blocking(number, blocking)
            return not blocking
    return None

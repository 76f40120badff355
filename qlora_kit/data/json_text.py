"""JSON as its standard has it, and values in which an absent field and a null one are the same.

Python's parser takes NaN, keeps the last of two equal keys, and builds what is nested too deep for
the code that reads it afterwards; each of these is refused here. A file that is one array is read
one element at a time, however its lines are broken.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from qlora_kit.data.lines import CHUNK, MAX_ROW_BYTES, opened, too_long
from qlora_kit.errors import DataError

MAX_DEPTH = 64
"""Objects and arrays inside one another; a tool's parameters have about ten."""


class JsonError(ValueError):
    """Text that a JSON parser takes and JSON does not allow."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f'the key "{twice[:40]}" stands twice in one object')
    return made


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
"""Raises `JsonError` beside what Python's own raises."""


def loads(text: str) -> Any:
    """The value of a JSON text; `ValueError` (also `JsonError`) with the reason."""
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise JsonError("it is nested too deep") from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Errors: `JsonError` for more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise JsonError(f"it is nested deeper than {MAX_DEPTH} levels")


def present(value: Any) -> Any:
    """A copy without the fields that are null, at every depth: tables fill absent ones with it.

    So does pandas with NaN. A null in an array stays, for nothing fills arrays. The value is no
    deeper than `MAX_DEPTH`.
    """
    if isinstance(value, dict):
        return {name: present(item) for name, item in value.items() if not _is_null(item)}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_plain(value: Any) -> bool:
    """Whether JSON can hold the value: no bytes, dates or infinite numbers, as Parquet has."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or (
        isinstance(value, (str, bool, int, float))
        and not (isinstance(value, float) and not math.isfinite(value))
    )


def elements(path: Path, limit: int = MAX_ROW_BYTES) -> Iterator[tuple[int, Any]]:
    """`(line, element)` in their order; `DataError` with `file:line`."""
    with opened(path) as file:
        text = _JsonText(file, path, limit)
        text.expect("[")
        more = text.peek() != "]"
        while more:
            line = text.line
            yield line, text.value()
            if more := text.peek() == ",":
                text.expect(",")
                text.peek()
        text.expect("]")
        if text.peek():
            raise text.error("more text after the end of the array")


class _JsonText:
    """The characters of a JSON file, read in chunks, with the line of the next one."""

    def __init__(self, file: IO[bytes], path: Path, limit: int) -> None:
        self._file, self._path, self._limit = file, path, limit
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = DECODER.raw_decode
        self._buffer, self._at, self._done, self.line = "", 0, False, 1

    def error(self, reason: str) -> DataError:
        return DataError(f"{self._path}:{self.line}: {reason}", "correct the JSON array there")

    def peek(self) -> str:
        """The next character that is not blank, which becomes the next one; "" at the end."""
        while True:
            rest = len(self._buffer)
            while self._at < rest and self._buffer[self._at] in " \t\r\n":
                self.line += self._buffer[self._at] == "\n"
                self._at += 1
            if self._at < rest:
                return self._buffer[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(f'"{character}" is missing, found {found or "the end of the file"}')
        self._at += 1

    def value(self) -> Any:
        """The JSON value that starts here."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._buffer, self._at)
                if end < len(self._buffer) or not self._more():
                    if end - self._at > self._limit:
                        raise too_long(f"{self._path}:{self.line}: a value", self._limit)
                    break
            except json.JSONDecodeError as error:
                # What ends with the buffer may go on in the file.
                cut = error.pos + 16 > len(self._buffer) or error.msg.startswith("Unterminated")
                if len(self._buffer) - self._at > self._limit:
                    raise too_long(f"{self._path}:{self.line}: a value", self._limit) from error
                if not cut or not self._more():
                    self.line += self._buffer.count("\n", self._at, error.pos)
                    raise self.error(f"not JSON: {error.msg}") from error
            except JsonError as error:
                raise self.error(str(error)) from error
            except (RecursionError, ValueError) as error:
                raise self.error(f"nested too deep, or a number too long: {error}") from error
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end
        return value

    def _more(self) -> bool:
        """Read on, at least doubling what is pending, so that long values are scanned few times."""
        if self._done:
            return False
        pending = self._buffer[self._at :]
        raw = self._file.read(max(CHUNK, len(pending)))
        self._done = not raw
        try:
            self._buffer, self._at = pending + self._decoder.decode(raw, final=self._done), 0
        except UnicodeDecodeError as error:
            self.line += pending.count("\n") + raw[: error.start].count(b"\n")
            raise self.error(
                f"byte 0x{error.object[error.start]:02x} near byte offset "
                f"{self._file.tell() - len(error.object) + error.start} of the file is not UTF-8"
            ) from error
        return not self._done or bool(self._buffer)

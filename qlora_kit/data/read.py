"""Files to rows: what the user handed in, checked field by field; every error has `file:line`.

A row has one of four shapes, recognised from the fields of the first row and held to in the rest:
`text`, `prompt` (`prompt`, `completion`), `instruction` (Alpaca) and `messages` (also ShareGPT's
`conversations`). Whatever the shape, what leaves here is one of
`{"text"} | {"prompt", "completion"} | {"messages": [{"role", "content"}]}`.
Reading streams, line by line. Held-out rows are the file that was named for them, else the
directory's `valid.jsonl`, else its `test.jsonl`, else a share drawn by the seed.

Left out: other file types and hub data sets, which are refused by name; tokens (`prompt.py`).
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config import DEFAULT_EVAL_FRACTION, DataConfig
from qlora_kit.errors import ConfigError, DataError, UnsafeInputError, from_os_error

MAX_LINE_BYTES = 64 * 1024**2
"""A longer line is refused, so that a file without line ends cannot fill the memory."""

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
SHAPES = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The fields that a row of each shape must have; the first shape that fits is taken."""

SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "user", "assistant")
OTHER_SUFFIXES = (".json", ".csv", ".parquet", ".txt", ".gz", ".zst")


@dataclass(frozen=True)
class Row:
    """One row of one of the three normal shapes, and where it was read."""

    content: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`, as errors show it."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Rows:
    """What is trained on and what is held out; the sources are words for people."""

    train: list[Row]
    evaluation: list[Row]
    format: str
    train_source: str
    eval_source: str


def load_rows(config: DataConfig, seed: int) -> Rows:
    """All rows of a run; no held-out row is among those that are trained on.

    Raises `DataError` or `UnsafeInputError` for a file, `ConfigError` for options that disagree.
    """
    train_path, eval_path = _find(config.data)
    if eval_path and config.eval_fraction is not None:
        raise ConfigError(
            f"eval_fraction {config.eval_fraction:g} is given beside {eval_path}, which is held "
            "out already",
            f"leave eval_fraction out, or give --data {train_path}",
        )
    if config.eval_data is not None:
        eval_path = Path(os.path.expanduser(config.eval_data))
    _check_file(train_path)
    if eval_path:
        _check_file(eval_path)
        if eval_path.samefile(train_path):
            raise ConfigError(
                f"eval_data {eval_path} is the file that is trained on",
                "name another file, or leave eval_data out to hold out a share",
            )
    format = _format_of(train_path) if config.format == "auto" else config.format
    train = list(read_rows(train_path, format))
    train_source = _words(train_path)
    if eval_path:
        evaluation = list(read_rows(eval_path, format))
        return Rows(train, evaluation, format, train_source, _words(eval_path))
    fraction = DEFAULT_EVAL_FRACTION if config.eval_fraction is None else config.eval_fraction
    if fraction == 0:
        return Rows(train, [], format, train_source, "none")
    if len(train) == 1:
        return Rows(train, [], format, train_source, f"none: {train_source} has a single row")
    held_out = _draw(len(train), fraction, seed)
    return Rows(
        [row for index, row in enumerate(train) if index not in held_out],
        [row for index, row in enumerate(train) if index in held_out],
        format,
        train_source,
        f"{100 * fraction:g} % of {train_source}, drawn by seed {seed}",
    )


def read_rows(path: Path, format: str = "auto") -> Iterator[Row]:
    """The rows of a .jsonl file, one at a time, in the order of the file.

    A byte order mark, CRLF, blank lines and a missing last line end are accepted. Raises
    `DataError` with `file:line`, or `UnsafeInputError` for what is no plain file.
    """
    if format == "auto":
        format = _format_of(path)
    for line, content in _objects(path):
        yield Row(_normalise(content, format, f"{path}:{line}"), str(path), line)


def recognise(content: Mapping[str, Any], where: str) -> str:
    """The name of the shape (`--format`) that a row's fields have, else `DataError`."""
    if "conversations" in content:
        return "messages"
    for shape, fields in SHAPES.items():
        if all(field in content for field in fields):
            return shape
    # Name the field that is missing from the shape that was most likely meant.
    for field in itertools.chain.from_iterable(SHAPES.values()):
        if _closest(field, content):
            raise _missing(field, content, where)
    for fields in SHAPES.values():
        if any(field in content for field in fields):
            raise _missing(next(f for f in fields if f not in content), content, where)
    wanted = "; ".join(" + ".join(fields) for fields in SHAPES.values())
    raise DataError(
        f"{where}: the fields are {_listed(content) or 'none'}, which is no known shape",
        f"rename them to one of: {wanted}",
    )


def _find(data: str) -> tuple[Path, Path | None]:
    """The file to train on, and the held-out file of its directory where there is one."""
    path = Path(os.path.expanduser(data))
    if data == "sample" or data.startswith("sample:"):
        names = sorted(item.name for item in SAMPLES.glob("*") if item.is_dir())
        name = data.partition(":")[2] or (names[0] if names else "")
        if name not in names:
            raise DataError(
                f"{data}: no such sample", f"the package has: {', '.join(names) or 'none'}"
            )
        path = SAMPLES / name
    if not path.is_dir():
        return path, None
    if _table(path, "train") is None:
        raise DataError(f"{path}: the directory has no train.jsonl", "name a .jsonl file in it")
    return path / "train.jsonl", _table(path, "valid") or _table(path, "test")


def _table(directory: Path, stem: str) -> Path | None:
    """`stem.jsonl`, where there is one; the same in a type that is not read is an error."""
    path = directory / f"{stem}.jsonl"
    if os.path.lexists(path):
        return path
    for suffix in OTHER_SUFFIXES:
        if os.path.lexists(path.with_suffix(suffix)):
            raise _not_read(path.with_suffix(suffix))
    return None


def _words(path: Path) -> str:
    in_sample = path.parent.parent == SAMPLES
    return f"sample:{path.parent.name}/{path.name}" if in_sample else path.name


def _draw(num_rows: int, fraction: float, seed: int) -> frozenset[int]:
    """Which rows are held out: at least one, and never all."""
    count = min(max(1, round(fraction * num_rows)), num_rows - 1)
    # `random()` is the one method whose sequence Python keeps the same between versions.
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(num_rows)]
    return frozenset(sorted(range(num_rows), key=keys.__getitem__)[:count])


def _check_file(path: Path) -> None:
    """Before it is opened: opening a FIFO waits for a writer, and a device need not end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        remedy = "check the path; what is read: a .jsonl file, or a directory with train.jsonl"
        if not path.is_absolute() and len(path.parts) == 2 and not path.parent.is_dir():
            remedy += " (data sets on the hub are not read: download one first)"
        raise DataError(f"{path}: no such file", remedy) from error
    except OSError as error:
        raise from_os_error(error) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a directory", "name a .jsonl file in it")
    if not stat.S_ISREG(mode):
        raise UnsafeInputError(
            f"{path}: is a pipe, socket or device", "write the rows to a .jsonl file first"
        )
    if path.suffix.lower() != ".jsonl":
        raise _not_read(path)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, object)` of every line that is not blank; lines count from 1, and one must be."""
    _check_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise from_os_error(error) from error
    offset, empty = 0, True
    with file:
        for line in itertools.count(1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                break
            where, start = f"{path}:{line}", offset
            offset += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where}: the line is longer than {MAX_LINE_BYTES // 1024**2} MiB",
                    "write one row per line",
                )
            if line == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{where}: byte offset 0: UTF-16", "save the file as UTF-8")
                if raw.startswith(b"\xef\xbb\xbf"):
                    raw, start = raw[3:], 3
            if raw.strip():
                empty = False
                yield line, _parse(raw, where, start)
    if empty:
        raise DataError(f"{path}:1: the file is empty or blank", "give at least one row")


def _parse(raw: bytes, where: str, offset: int) -> dict[str, Any]:
    """One line as an object; `offset` is where it starts in the file."""
    remedy = "write one complete JSON object per line"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte 0x{raw[error.start]:02x} at byte offset {error.start} of the line "
            f"({offset + error.start} of the file) is not UTF-8",
            "save the file as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: NUL at byte offset {offset + raw.index(0)}: UTF-16, or no text at all",
            "save the file as UTF-8",
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg}, column {error.pos + 1}"
        if error.msg == "Extra data":
            reason = f"more than one JSON value, the second at column {error.pos + 1}"
        elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            reason = "the line ends in the middle of its JSON"
        raise DataError(f"{where}: {reason}", remedy) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: JSON too deep or a number too long: {error}", remedy) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: the row is {_kind(value)}, not an object", remedy)
    return value


def _normalise(content: Mapping[str, Any], format: str, where: str) -> dict[str, Any]:
    """The row in its normal shape; `format` is a name of `SHAPES`."""
    if format == "messages":
        return {"messages": _messages(content, where)}
    fields = {field: _text(content, field, where) for field in SHAPES[format]}
    if format != "instruction":
        return fields
    prompt = f"### Instruction:\n{fields['instruction']}\n\n"
    if content.get("input") is not None and (extra := _text(content, "input", where)):
        prompt += f"### Input:\n{extra}\n\n"
    return {"prompt": prompt + "### Response:\n", "completion": fields["output"]}


def _messages(content: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The turns: perhaps a system message, then a user's, then any order of the two."""
    share_gpt = "conversations" in content and "messages" not in content
    field = "conversations" if share_gpt else "messages"
    if field not in content:
        raise _missing(field, content, where)
    turns = content[field]
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns == [] else _kind(turns)
        raise DataError(f'{where}: "{field}" is {found}', "give a list of messages")
    if content.get("tools"):
        raise DataError(f'{where}: "tools" cannot be trained on', "leave rows with tools out")
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns, 1):
        here = f"{where}: {field}[{number - 1}]"
        if not isinstance(turn, dict):
            raise DataError(f"{here} is {_kind(turn)}, not an object", "give role and content")
        # Dropping these would train on something else than what the row says.
        for extra in ("tool_calls", "function_call", "weight"):
            if turn.get(extra) is not None:
                raise DataError(f'{here}: "{extra}" is not supported', "leave such rows out")
        role = _text(turn, "from" if share_gpt else "role", here)
        if share_gpt:
            role = SHARE_GPT_ROLES.get(role, role)
        if role not in ROLES:
            names = (*ROLES, *SHARE_GPT_ROLES) if share_gpt else ROLES
            near = difflib.get_close_matches(role.lower(), names, 1)
            hint = f', did you mean "{near[0]}"?' if near else ""
            raise DataError(f'{here}: unknown role "{role[:40]}"{hint}', f"use {', '.join(names)}")
        if role == "system" and number > 1:
            raise DataError(
                f"{here}: a system message that is not the first", "put one at the start at most"
            )
        if role == "assistant" and not any(turn["role"] == "user" for turn in messages):
            raise DataError(
                f"{here}: an assistant turn before any user turn", "start with the user's message"
            )
        text = _text(turn, "value" if share_gpt else "content", here)
        messages.append({"role": role, "content": text})
    return messages


def _format_of(path: Path) -> str:
    line, content = next(_objects(path))
    return recognise(content, f"{path}:{line}")


def _text(content: Mapping[str, Any], field: str, where: str) -> str:
    if field not in content:
        raise _missing(field, content, where)
    value = content[field]
    if not isinstance(value, str):
        raise DataError(f'{where}: "{field}" is {_kind(value)}, not text', "give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "{field}" has half a surrogate pair (\\u{ord(value[error.start]):04x})',
            "write the whole character",
        ) from error
    return value


def _missing(field: str, content: Mapping[str, Any], where: str) -> DataError:
    guess = _closest(field, content)
    hint = f', did you mean "{field}" by "{guess}"?' if guess else ""
    return DataError(
        f'{where}: no field "{field}" (the row has {_listed(content) or "none"}){hint}',
        f'give every row "{field}"',
    )


def _closest(field: str, content: Iterable[str]) -> str:
    """The field of the row that looks like a misspelling of `field`."""
    # A field of the shapes is no misspelling: "output" is not one of "input".
    known = {name for fields in SHAPES.values() for name in fields}
    candidates = [name for name in content if name not in known]
    return next(iter(difflib.get_close_matches(field, candidates, 1, 0.75)), "")


def _listed(content: Iterable[str]) -> str:
    return ", ".join(f'"{name[:40]}"' for name in itertools.islice(content, 8))


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return "a number"
    return (
        "text" if isinstance(value, str) else "an array" if isinstance(value, list) else "an object"
    )


def _not_read(path: Path) -> DataError:
    return DataError(
        f"{path}: only .jsonl files are read, not {path.suffix or 'files without a suffix'}",
        "convert it to .jsonl: one JSON object per line",
    )

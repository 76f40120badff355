"""The rows of a run: what is trained on, what is held out, and where each row was read.

Rows stay on disk: a `Table` reads its file again each time it is gone through, so memory does not
grow with the file. Held-out rows are the file that was named for them, else the directory's
`valid.*` or `test.*`, else a share of the records drawn by the seed, unless nobody asked for it and
it is less than one record. The shape is recognised from the first row and held to in the rest.

Left out: file types (`records.py`), fields (`schema.py`), tokens (`encode.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit.config.data import DEFAULT_EVAL_FRACTION, DataConfig
from qlora_kit.data.json_text import JsonError, check_depth, present
from qlora_kit.data.lines import MAX_ROW_BYTES, GivenRows, check_file, kind_of
from qlora_kit.data.order import permutation
from qlora_kit.data.records import count, fingerprint, hub_splits, records
from qlora_kit.data.schema import normalise, parse_columns, recognise, rename
from qlora_kit.data.source import HELD_OUT, HubSplit, Source, files, find, parts_of, words
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.options.checks import size_bytes

PREFERENCE = "preference"
"""The shape of pairs of answers."""


@dataclass(frozen=True)
class Row:
    """One row of one of the four normal shapes, and where it was read."""

    content: dict[str, Any]
    source: str
    line: int
    literal: bool = False
    """whether control tokens that its text spells are text, as in Alpaca's fields"""
    unused: tuple[str, ...] = ()
    """names of its fields that nothing reads"""

    @property
    def where(self) -> str:
        """`file:line`, as errors show it."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Table:
    """The rows of a source, or of the records of it that are `chosen`, read when gone through.

    `chosen` has a boolean for each record of the source.
    """

    source: Source
    format: str
    columns: tuple[tuple[str, str], ...] = ()
    chosen: np.ndarray | None = None
    literal: bool = False
    """whether control tokens that rows spell are text, whatever the rows' shape"""
    as_chat: bool = False
    """whether Alpaca's rows become chats"""
    max_row_bytes: int = MAX_ROW_BYTES

    def __iter__(self) -> Iterator[Row]:
        columns = dict(self.columns)
        for name, line, record in _records(self.source, self.chosen, self.max_row_bytes):
            where = f"{name}:{line}"
            content, hidden = _fields(record, columns, where)
            for row in normalise(content, self.format, where, self.as_chat, is_document(name)):
                literal, unused = self.literal or row.literal, (*hidden, *row.unused)
                yield Row(row.content, name, line, literal, unused)

    def __bool__(self) -> bool:
        """Whether there are rows; no source is without any."""
        return self.chosen is None or bool(self.chosen.any())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the rows depend on."""
        parts = parts_of(self.source)
        digest = hashlib.blake2b(" ".join(map(fingerprint, parts)).encode())
        # The name is part of what is kept: rows are shown with their `file:line`.
        digest.update(
            json.dumps(
                [str(self.source), self.format, self.columns, self.literal, self.as_chat]
            ).encode()
        )
        if self.chosen is not None:
            digest.update(np.packbits(self.chosen).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """What is trained on and what is held out; the sources are words for people."""

    train: Table
    evaluation: Table | tuple[()]
    format: str
    train_source: str
    eval_source: str

    @functools.cached_property
    def is_chat(self) -> bool:
        """Whether rows are chats, or pairs of them; any shape but plain text may be."""
        first = next(iter(self.train)).content
        return "messages" in first.get("chosen", first)

    @property
    def form(self) -> str:
        """What is trained on: `messages`, or else the shape; of pairs that of an answer."""
        if self.is_chat:
            return "messages"
        return "prompt" if self.format == PREFERENCE else self.format


def load_rows(config: DataConfig, seed: int, given: Mapping[str, GivenRows] | None = None) -> Rows:
    """The rows of a run; no held-out row is among those that are trained on.

    `given` has the rows that a program hands over, by the names that `config` has for them.
    Of each source the first row is read at once, the others when they are gone through. Raises
    `DataError` or `UnsafeInputError` for a file, `ConfigError` for options that disagree,
    `ResourceError` for a package or a network that is missing.
    """
    train_source, eval_source = _sources(config, given or {})
    columns = parse_columns(config.columns)
    limit = size_bytes(config.max_row_size)
    format = _format(train_source, config.format, columns, limit)
    if format == PREFERENCE and config.train_on_prompt:
        raise ConfigError(
            "train_on_prompt true with pairs: a prompt says nothing of what is preferred",
            "leave --train_on_prompt out",
        )

    def table(source: Source, chosen: np.ndarray | None = None) -> Table:
        pairs, literal = tuple(columns.items()), config.literal_control_tokens
        as_chat = config.instruction_as_chat
        return Table(source, format, pairs, chosen, literal, as_chat, limit)

    train = table(train_source)
    next(iter(train))
    if eval_source:
        evaluation = table(eval_source)
        next(iter(evaluation))
        return Rows(train, evaluation, format, words(train_source), words(eval_source))
    fraction = DEFAULT_EVAL_FRACTION if config.eval_fraction is None else config.eval_fraction
    if fraction == 0:
        return Rows(train, (), format, words(train_source), "none")
    num_records = sum(count(part, limit) for part in parts_of(train_source))
    if num_records == 1:
        single = f"none: {words(train_source)} has a single row"
        return Rows(train, (), format, words(train_source), single)
    if config.eval_fraction is None and fraction * num_records < 1:
        # One row is more than the share then, and of two rows half of what there is to learn.
        few = (
            f"none: {100 * fraction:g} % of the {num_records} rows of {words(train_source)} is "
            "less than one; --eval_fraction asks for more"
        )
        return Rows(train, (), format, words(train_source), few)
    held_out = draw(num_records, fraction, seed)
    return Rows(
        table(train_source, ~held_out),
        table(train_source, held_out),
        format,
        words(train_source),
        f"{100 * fraction:g} % of {words(train_source)}, drawn by seed {seed}",
    )


def _sources(config: DataConfig, given: Mapping[str, GivenRows]) -> tuple[Source, Source | None]:
    """Where the rows come from that are trained on, and those that are held out beside them."""
    train_source: Source
    eval_source: Source | None
    if config.data in given:
        train_source, eval_source = given[config.data], None
    else:
        train_source, eval_source = find(config.data)
    if isinstance(train_source, HubSplit):
        eval_source = _held_out_split(train_source)
    if eval_source and config.eval_fraction:
        raise ConfigError(
            f"eval_fraction {config.eval_fraction:g} is given beside {eval_source}, which is held "
            "out already",
            f"leave eval_fraction out, or give --data {train_source}",
        )
    if config.eval_data is not None:
        eval_source = given.get(config.eval_data) or files(config.eval_data)
    elif config.eval_fraction == 0:
        eval_source = None
    for part in [*parts_of(train_source), *(parts_of(eval_source) if eval_source else ())]:
        if isinstance(part, Path):
            check_file(part)
    if eval_source:
        _check_different(train_source, eval_source)
    return train_source, eval_source


def read_rows(path: Path, format: str = "auto", columns: str | None = None) -> Iterator[Row]:
    """The rows of one file, one at a time, in the order of the file. Errors as `load_rows`."""
    mapping = parse_columns(columns)
    yield from Table(path, _format(path, format, mapping), tuple(mapping.items()))


def is_document(name: str) -> bool:
    """Whether a file is one text, cut into rows, and not rows that are texts."""
    return kind_of(Path(name)) == ".txt"


def _records(
    source: Source, chosen: np.ndarray | None, limit: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The file, the line and the fields of each record of all files, or of those chosen."""
    wanted = None if chosen is None else iter(chosen)
    for part in parts_of(source):
        name = str(part)
        for line, record in records(part, wanted, limit):
            yield name, line, record


def _format(
    source: Source, format: str, columns: dict[str, str], limit: int = MAX_ROW_BYTES
) -> str:
    """The shape of a source's rows: that of its first row, where none is named."""
    if format != "auto":
        return format
    name, line, record = next(_records(source, None, limit))
    where = f"{name}:{line}"
    return recognise(_fields(record, columns, where)[0], where)


def _fields(
    record: dict[str, Any], columns: Mapping[str, str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """A record's fields that are not null, under our names, and the names of those hidden."""
    try:
        check_depth(record)
    except JsonError as error:
        raise DataError(f"{where}: {error}", "write one object for each row") from error
    return rename(present(record), columns, where)


def draw(num_records: int, fraction: float, seed: int) -> np.ndarray:
    """Which records are held out, as booleans: at least one, and never all."""
    held_out = min(max(1, round(fraction * num_records)), num_records - 1)
    chosen = np.zeros(num_records, dtype=bool)
    chosen[permutation(num_records, seed)[:held_out]] = True
    return chosen


def _check_different(train: Source, evaluation: Source) -> None:
    for path in parts_of(evaluation):
        for other in parts_of(train):
            if path is other or (
                isinstance(path, Path) and isinstance(other, Path) and path.samefile(other)
            ):
                raise ConfigError(
                    f"eval_data {path} is the file that is trained on",
                    "name another file, or leave eval_data out to hold out a share",
                )


def _held_out_split(train: HubSplit) -> HubSplit | None:
    splits = hub_splits(train.name, train.subset)
    stem = next((stem for stem in HELD_OUT if stem in splits), None)
    return HubSplit(train.name, train.subset, stem) if stem else None

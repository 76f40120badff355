"""The data: which rows, and how they become tokens."""

from __future__ import annotations

import datetime
import json
import re
import typing
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import MOST_TOKENS, a_name, a_size, between, joined, one_of
from qlora_kit.options.option import Options, option

DATA_FORMATS = ("auto", "text", "prompt", "instruction", "messages", "preference")
LONG_ROWS = ("truncate", "drop", "error")
DEFAULT_EVAL_FRACTION = 0.05
DEFAULT_LENGTH = 1024


def _day(value: str) -> str | None:
    try:
        good = datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        good = False
    # A C library may refuse to write years before 1900.
    return None if good and value >= "1900" else "a day as 2026-01-31"


def assignments(text: str) -> dict[str, Any]:
    """`enable_thinking=false,effort=high` as {name: value}; a value is JSON, else text.

    Errors: `ValueError`.
    """
    values: dict[str, Any] = {}
    # A comma inside JSON is none between two variables: one that a name and "=" follow is.
    for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or name in values:
            raise ValueError("NAME=VALUE, separated by commas, each name once")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            lower = value.lower()
            values[name] = {"true": True, "false": False, "none": None}.get(lower, value)
    return values


def _assignments(value: str) -> str | None:
    try:
        assignments(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class DataConfig(Options):
    """Which rows, and how they become tokens."""

    title: typing.ClassVar[str] = "data"

    data: str = option(
        "sample",
        ".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file (.gz too), several with commas, "
        "a pattern of them, directory with train.* and valid.* or from save_to_disk, hub id "
        "(owner/name or owner/name:subset), or sample:NAME from the package",
        aliases=("dataset",),
        check=a_name(),
        reads=joined,
        path=True,
        metavar="FILE|DIR",
    )
    eval_data: str | None = option(
        None,
        "held-out rows; else the directory's valid.*, else its test.*, else a share",
        check=a_name(),
        reads=joined,
        path=True,
        metavar="FILE",
    )
    eval_fraction: float | None = option(
        None,
        "share of the rows held out where there is no other held-out file; 0: no evaluation",
        check=between(0, 1, open_high=True),
        shown_default=f"{DEFAULT_EVAL_FRACTION}, where that is a row or more",
    )
    format: str = option("auto", "shape of the rows", check=one_of(*DATA_FORMATS))
    max_row_size: str = option("16MiB", "a longer row is an error", check=a_size, metavar="SIZE")
    columns: str | None = option(
        None,
        "other names of the rows' fields: question=prompt,answer=completion",
        check=a_name(),
        metavar="NAME=FIELD,...",
    )
    instruction_as_chat: bool = option(
        False, "Alpaca's rows go through the chat template, not into Alpaca's own form"
    )
    chat_template: str | None = option(
        None,
        "chat template for rows of messages: chatml, llama-2, llama-3, alpaca, plain, or a file; "
        "saved with the adapter",
        check=a_name(),
        path=True,
        metavar="NAME|FILE",
        shown_default="the model's own",
    )
    chat_template_args: str | None = option(
        None,
        "variables of the chat template, comma-separated: enable_thinking=false",
        check=_assignments,
        metavar="NAME=VALUE,...",
    )
    chat_date: str | None = option(
        None,
        "day that a chat template writes where it asks for today's; kept with the run",
        check=_day,
        metavar="YYYY-MM-DD",
        shown_default="today",
    )
    merge_system: bool = option(
        False, "put a system message before the first user's where the chat template takes none"
    )
    train_on: str = option(
        "all", "assistant turns of a chat that are trained on", check=one_of("all", "last")
    )
    train_on_prompt: bool = option(False, "supervise the prompt as well")
    literal_control_tokens: bool = option(
        False,
        "control tokens spelled in rows of text, prompt and completion are characters, not tokens",
    )
    long_rows: str = option(
        "truncate",
        "rows of more than --max_length tokens: truncate (a prompt loses its beginning, a chat its "
        "last turns, a text becomes several rows), drop, or error",
        check=one_of(*LONG_ROWS),
    )
    max_length: int | None = option(
        None,
        "tokens per row",
        aliases=("max_seq_length",),
        check=between(2, MOST_TOKENS),
        shown_default=f"{DEFAULT_LENGTH}, or the model's context where that is shorter",
    )
    allow_longer_context: bool = option(False, "let --max_length exceed the model's context")
    packing: bool = option(
        False, "fill sequences of --max_length with several rows, isolated from each other"
    )
    group_by_length: bool = option(
        False, "put rows of like length into a batch: less padding, a less random order"
    )
    token_cache: str | None = option(
        None,
        "where tokens are kept between runs; none: nowhere",
        check=a_name(),
        path=True,
        shown_default="~/.cache/qlora_kit/tokens",
        metavar="DIR|none",
    )

    def length_in(self, context: int) -> int:
        """Tokens per row on a model made for `context` tokens; `ConfigError` for more than that."""
        length = self.max_length or min(DEFAULT_LENGTH, context)
        if length > context and not self.allow_longer_context:
            raise ConfigError(
                f"max_length {length} is above the model's context of {context} tokens",
                "lower it, or give --allow_longer_context",
            )
        return length

    def _conflicts(self) -> typing.Iterator[str]:
        if self.eval_data is not None and self.eval_fraction is not None:
            yield (
                f"eval_fraction {self.eval_fraction:g} is given beside eval_data {self.eval_data}: "
                "name one of them"
            )
        if self.packing and self.group_by_length:
            yield "packing and group_by_length are given: packs have one length, name one of them"

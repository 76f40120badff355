"""What becomes of each row when it is encoded, and what is counted over all of them.

Every row leaves something here: its tokens, or the reason why it has none; how many tokens were
cut and why; which of its fields nobody reads; how many control tokens its text spells. The counts
are stored with the tokens and shown before a run, so that nothing of a row is lost in silence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.data.chat_template import ChatOptions, chat_options
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import IGNORE, Encoded

LISTED = 50
"""Rows that are kept by name, of the skipped and of the truncated ones."""

NAMES = 200
"""Different names of unused fields that are counted; more are counted together."""


@dataclass(frozen=True)
class EncodeRules:
    """How rows become tokens, beside tokenizer and length; each as the option of its name."""

    train_on_prompt: bool = False
    long_rows: str = "truncate"
    train_on: str = "all"
    merge_system: bool = False
    chat_template_args: str | None = None
    chat_date: str | None = None

    @staticmethod
    def of(config: DataConfig) -> EncodeRules:
        """The rules among the options of a run."""
        names = [field.name for field in dataclasses.fields(EncodeRules)]
        return EncodeRules(**{name: getattr(config, name) for name in names})

    @functools.cached_property
    def chat(self) -> ChatOptions:
        """Those that are about chats."""
        return chat_options(self)


DEFAULT_RULES = EncodeRules()


@dataclass(frozen=True)
class Outcome:
    """One row's encodings, gone through once, or why there is none."""

    row: Row
    encodings: Iterable[Encoded] = ()
    skipped: str | None = None
    cut: str | None = None
    """what truncation takes from the row, in words; None where it is whole"""
    cut_tokens: int = 0
    controls: int = 0
    """control tokens that the row's text spells and that are read as such"""
    doubled: int = 0
    """starts and ends that stood twice and were made one"""


class Tally:
    """The counts of many outcomes."""

    def __init__(self, unknown_id: int | None) -> None:
        self._unknown_id = unknown_id
        self._sums: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._cut: dict[str, list[int]] = {}
        self._unused: Counter[str] = Counter()
        self._lost: list[tuple[str, str]] = []
        self._shortened: list[tuple[str, int]] = []

    def stored(self, outcome: Outcome) -> Iterator[list[int]]:
        """The rows of an outcome as they are stored, a token that is not trained on as ~id.

        What they hold is counted as they are gone through.
        """
        sums, where = self._sums, outcome.row.where
        sums["source_rows"] += 1
        sums["controls"] += outcome.controls
        sums["doubled"] += outcome.doubled
        for name in outcome.row.unused:
            known = name in self._unused or len(self._unused) < NAMES
            self._unused[name if known else "(others)"] += 1
        if outcome.skipped is not None:
            self._skipped[outcome.skipped] += 1
            if len(self._lost) < LISTED:
                self._lost.append((where, outcome.skipped))
            return
        if outcome.cut is not None:
            counts = self._cut.setdefault(outcome.cut, [0, 0])
            counts[0] += 1
            counts[1] += outcome.cut_tokens
            if len(self._shortened) < LISTED:
                self._shortened.append((where, outcome.cut_tokens))
        sums["pairs"] += "chosen" in outcome.row.content
        for encoded in outcome.encodings:
            sums["rows"] += 1
            sums["tokens"] += len(encoded.input_ids)
            sums["supervised_tokens"] += len(encoded.labels) - encoded.labels.count(IGNORE)
            if self._unknown_id is not None:
                sums["unknown_tokens"] += encoded.input_ids.count(self._unknown_id)
            yield [
                token if label != IGNORE else ~token
                for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
            ]

    def facts(self) -> dict[str, Any]:
        """The counts, as JSON holds them."""
        names = ("source_rows", "rows", "pairs", "tokens", "supervised_tokens", "unknown_tokens")
        return {
            **{name: self._sums[name] for name in (*names, "controls", "doubled")},
            "skipped": dict(self._skipped),
            "lost": self._lost,
            "truncated": sum(rows for rows, _ in self._cut.values()),
            "cut_tokens": sum(tokens for _, tokens in self._cut.values()),
            "cut": self._cut,
            "shortened": self._shortened,
            "unused": dict(self._unused.most_common()),
        }

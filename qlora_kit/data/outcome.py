"""What becomes of each row when it is encoded, and what is counted and said of all of them.

Every row leaves something here: its tokens, or the reason why it has none; how many tokens were
cut and why; which of its fields nobody reads; how many control tokens its text spells. The counts
are stored with the tokens and shown before a run, so that nothing of a row is lost in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_kit.config.data import DataConfig
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions, chat_options, date_of
from qlora_kit.data.rows import Row
from qlora_kit.data.token_rows import TokenRows, pair_digests
from qlora_kit.data.tokens import IGNORE, Encoded
from qlora_kit.errors import DataError

LISTED = 50
"""Rows that are kept by name, of the skipped and of the truncated ones."""

NAMES = 200
"""Different names of unused fields that are counted; more are counted together."""

NAMED = 12
"""Unused fields that a note names; `show-data --json` has all."""


@dataclass(frozen=True)
class EncodeRules:
    """How rows become tokens, beside tokenizer and length; as the options of these names."""

    train_on_prompt: bool = False
    long_rows: str = "truncate"
    chat: ChatOptions = NO_OPTIONS

    @staticmethod
    def of(config: DataConfig) -> EncodeRules:
        """The rules among the options of a run."""
        return EncodeRules(config.train_on_prompt, config.long_rows, chat_options(config))

    def dated(self, tokenizer: Any) -> EncodeRules:
        """The same with the day that chats are written on, where the tokenizer's template asks."""
        return replace(self, chat=replace(self.chat, date=date_of(tokenizer, self.chat.date)))


DEFAULT_RULES = EncodeRules()


@dataclass(frozen=True)
class EncodedRows:
    """The rows that are trained on, and what became of the others."""

    rows: Sequence[Encoded]
    skipped: dict[str, int]
    truncated: int
    tokens: int
    supervised_tokens: int
    pairs: int = 0
    """of them, where the rows are pairs' rows, one beside the other"""
    cut_tokens: int = 0
    """tokens that truncation took away"""
    cut: tuple[tuple[str, int, int], ...] = ()
    """what truncation took away, from how many rows, how many tokens"""
    duplicates: int = 0
    """rows that are equal to an earlier one"""
    unused: tuple[tuple[str, int], ...] = ()
    """fields of rows that nothing reads, and how many rows have them"""
    controls: int = 0
    """control tokens that texts spell and that are read as such"""
    doubled: int = 0
    """starts and ends that rows spell themselves and that are written once"""
    unknown_tokens: int = 0
    """tokens that stand for what the tokenizer does not know"""
    lost: tuple[tuple[str, str], ...] = ()
    """`file:line` and reason of the first skipped rows"""
    shortened: tuple[tuple[str, int], ...] = ()
    """`file:line` of the first truncated rows, and how many tokens each lost; 0: cut in rows"""
    refusal: DataError | None = None
    """why these rows cannot be trained on, where they were encoded to be shown only"""

    @staticmethod
    def of(rows: TokenRows, facts: dict[str, Any], refusal: DataError | None) -> EncodedRows:
        """Rows with what was counted of them (`Tally.facts`)."""
        known = {name: facts[name] for name in EncodedRows.__annotations__ if name in facts}
        known |= {name: tuple(map(tuple, facts[name])) for name in ("lost", "shortened")}
        known["cut"] = tuple((what, *counts) for what, counts in facts["cut"].items())
        known["unused"] = tuple(facts["unused"].items())
        return EncodedRows(**{**known, "rows": rows, "refusal": refusal})

    def shared_with(self, other: EncodedRows) -> int:
        """How many of these rows, or pairs, are also in `other`."""
        return int(np.isin(self._digests, other._digests).sum())

    @property
    def _digests(self) -> np.ndarray:
        """A hash of each row, or pair."""
        assert isinstance(self.rows, TokenRows)
        return pair_digests(self.rows.digests) if self.pairs else self.rows.digests

    @property
    def count(self) -> str:
        """How many rows there are, or pairs, in words."""
        number, word = (self.pairs, "pair") if self.pairs else (len(self.rows), "row")
        return f"{number:,} {word}{'' if number == 1 else 's'}"

    def notes(self, held_out: bool = False) -> Sequence[str]:
        """A line for each thing that is not as one might take it to be.

        In the order of what costs most: rows, tokens, fields, then how text was read. `held_out`
        is said with each.
        """
        rows = "held-out rows" if held_out else "rows"

        def some(count: int) -> str:
            return f"{count:,} {rows.removesuffix('s') if count == 1 else rows}"

        notes = [f"{some(count)} skipped: {reason}" for reason, count in self.skipped.items()]
        for what, count, tokens in self.cut:
            # Of a text that goes on in the next row nothing is lost.
            lost = f"truncated, {tokens:,} tokens lost" if tokens else "longer than --max_length"
            notes.append(f"{some(count)} {lost}: {what}")
        if self.unused:
            named = [f'"{name}" ({count:,})' for name, count in self.unused[:NAMED]]
            if len(self.unused) > NAMED:
                named.append(f"and {len(self.unused) - NAMED} more")
            notes.append(f"fields of {rows} that are not used: {', '.join(named)}")
        if self.controls:
            notes.append(
                f"{self.controls:,} control tokens spelled in {rows} are read as tokens; "
                "--literal_control_tokens reads them as characters"
            )
        if self.doubled:
            notes.append(f"{self.doubled:,} starts and ends that {rows} spell are written once")
        if self.unknown_tokens:
            share = self.unknown_tokens / max(1, self.tokens)
            notes.append(
                f"{self.unknown_tokens:,} tokens of {rows} ({share:.2%}) are <unk>: the tokenizer "
                "does not know what stands there"
            )
        if self.duplicates:
            verb = "is" if self.duplicates == 1 else "are"
            notes.append(f"{some(self.duplicates)} {verb} the same as an earlier one")
        return notes


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

"""What `show-data` knows of a data set: counts, lengths, padding, and some rows token by token.

Everything comes from the functions that the training loop calls: the same reading, the same
encoding, the same orders and packs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.data.answers import ends_text
from qlora_kit.data.batch import lengths_of, padding_note
from qlora_kit.data.chat_template import templates_of
from qlora_kit.data.encode import encode, encode_rows
from qlora_kit.data.outcome import EncodedRows, EncodeRules
from qlora_kit.data.pairs import SIDES, is_pair
from qlora_kit.data.rows import Row, Rows
from qlora_kit.data.schedule import padding_shares
from qlora_kit.data.token_cache import cache_directory
from qlora_kit.data.tokens import IGNORE, Encoded, Skipped, decoded
from qlora_kit.errors import DataError


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are alike, and their text."""

    text: str
    trained: bool
    special: bool
    tokens: int


@dataclass(frozen=True)
class ShownRow:
    """One row, or why it is skipped; `part` counts the rows that a long text became.

    Of a pair there are two, and `side` says which.
    """

    where: str
    part: int
    parts: int
    truncated: bool
    skipped: str | None
    tokens: int
    trained_tokens: int
    control_tokens: int
    pieces: tuple[Piece, ...]
    side: str = ""


def shown_row(row: Row, outcome: list[Encoded] | Skipped, tokenizer: Any) -> list[ShownRow]:
    """What `outcome`, the encodings of a row or why there are none, shows of it."""
    if isinstance(outcome, Skipped):
        return [ShownRow(row.where, 1, 1, False, outcome.reason, 0, 0, 0, (_text_of(row),))]
    return [
        ShownRow(
            where=row.where,
            part=number,
            parts=len(outcome),
            truncated=one.truncated,
            skipped=None,
            tokens=len(one.input_ids),
            trained_tokens=len(one.labels) - one.labels.count(IGNORE),
            control_tokens=sum(piece.tokens for piece in pieces if piece.special),
            pieces=pieces,
            side=SIDES[number - 1] if is_pair(row.content) else "",
        )
        for number, one in enumerate(outcome, 1)
        for pieces in [tuple(_pieces(one, tokenizer))]
    ]


def _text_of(row: Row) -> Piece:
    """A skipped row's text as it was read."""
    text = _written(row.content)
    return Piece(text, trained=False, special=False, tokens=0)


def _written(content: dict[str, Any]) -> str:
    if is_pair(content):
        return "\n".join(f"{side}: {_written(content[side])}" for side in SIDES)
    turns = content.get("messages")
    if turns is None:
        return str(content.get("text") or content["prompt"] + content["completion"])
    return "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in turns)


def _pieces(row: Encoded, tokenizer: Any) -> list[Piece]:
    """The row's text in pieces; each is what its tokens add to the text before them."""
    special = {index for index, t in tokenizer.added_tokens_decoder.items() if t.special}
    kinds = [
        (label != IGNORE, token in special)
        for token, label in zip(row.input_ids, row.labels, strict=True)
    ]
    pieces: list[Piece] = []
    done, before = 0, ""
    for kind, group in itertools.groupby(kinds):
        size = len(list(group))
        done += size
        text = decoded(tokenizer, row.input_ids[:done])
        pieces.append(Piece(text[len(before) :], kind[0], kind[1], size))
        before = text
    return pieces


BINS = 20
"""Bars of the histogram of lengths."""


@dataclass(frozen=True)
class Part:
    """The counts of the rows that are trained on, or of the held-out ones."""

    source: str
    rows: int
    pairs: int
    """of rows, two each; 0 where rows are none"""
    tokens: int
    supervised_tokens: int
    truncated: int
    cut_tokens: int
    cut: tuple[tuple[str, int, int], ...]
    """what truncation took away, from how many rows, how many tokens"""
    duplicates: int
    unused: dict[str, int]
    """fields that nothing reads, and how many rows have them"""
    control_tokens: int
    """spelled in texts and read as tokens"""
    doubled: int
    """starts and ends that rows spell and that are written once"""
    unknown_share: float
    """of the tokens, those that stand for what the tokenizer does not know"""
    notes: tuple[str, ...]
    skipped: dict[str, int]
    skipped_rows: tuple[tuple[str, str], ...]
    truncated_rows: tuple[tuple[str, int], ...]

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those that are trained on."""
        return self.supervised_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    model: str
    format: str
    max_length: int
    chat_template: str | None
    chats: str | None
    """the tokens that end an assistant's turn, and the day that the chat template writes"""
    batch_size: int
    train: Part
    held_out: Part | None
    held_out_source: str
    shared: int
    padding: dict[str, float]
    """the share of padding in batches in random order, by length, and packed"""
    packs: int
    padding_note: str | None
    bins: tuple[tuple[int, int, int], ...]
    """first length, last length and rows of each bar of the histogram"""
    rows: tuple[ShownRow, ...]
    refusal: DataError | None
    """why a run would refuse these rows"""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        flat = asdict(replace(self, refusal=None))
        flat["refusal"] = None if self.refusal is None else str(self.refusal)
        for name, part in (("train", self.train), ("held_out", self.held_out)):
            if part is not None:
                flat[name]["supervised_share"] = part.supervised_share
        return flat


def report_of(
    rows: Rows,
    config: DataConfig,
    max_length: int,
    model: str,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    count: int,
) -> Report:
    """Encode the rows of a data set as a run would, the first `count` of them to be shown.

    Errors: those of encoding.
    """
    cache, rules = cache_directory(config.token_cache), EncodeRules.of(config)
    rules = rules.dated(tokenizer)
    refusal = None
    if rules.long_rows == "error":
        try:
            encode_rows(rows.train, tokenizer, max_length, rules, cache)
        except DataError as error:
            refusal, rules = error, replace(rules, long_rows="truncate")
    encoded = encode_rows(rows.train, tokenizer, max_length, rules, cache, refuse=False)
    held_out = None
    if rows.evaluation:
        held_out = encode_rows(rows.evaluation, tokenizer, max_length, rules, cache, refuse=False)
    lengths = lengths_of(encoded.rows)
    padding, packs = padding_shares(encoded.rows, batch_size, max_length, seed, bool(encoded.pairs))
    shown = [
        one
        for row in itertools.islice(rows.train, count)
        for one in shown_row(row, encode(row, tokenizer, max_length, rules), tokenizer)
    ]
    return Report(
        model=model,
        format=rows.format,
        max_length=max_length,
        chat_template=_template(tokenizer) if rows.is_chat else None,
        chats=ends_text(tokenizer, rules.chat) if rows.is_chat else None,
        batch_size=batch_size,
        train=_part(encoded, rows.train_source, encoded.notes()),
        held_out=None
        if held_out is None
        else _part(held_out, rows.eval_source, held_out.notes(held_out=True)),
        held_out_source=rows.eval_source,
        shared=0 if held_out is None else held_out.shared_with(encoded),
        padding=padding,
        packs=packs,
        padding_note=padding_note(tokenizer),
        bins=_bins(lengths.tolist()),
        # Of a pair both answers, of a long text not all parts.
        rows=tuple(shown if encoded.pairs else shown[:count]),
        refusal=refusal or encoded.refusal or (held_out.refusal if held_out else None),
    )


def _template(tokenizer: Any) -> str:
    return "\n\n".join(templates_of(tokenizer).values())


def _part(encoded: EncodedRows, source: str, notes: Sequence[str]) -> Part:
    return Part(
        source=source,
        rows=len(encoded.rows),
        pairs=encoded.pairs,
        tokens=encoded.tokens,
        supervised_tokens=encoded.supervised_tokens,
        truncated=encoded.truncated,
        cut_tokens=encoded.cut_tokens,
        cut=encoded.cut,
        duplicates=encoded.duplicates,
        unused=dict(encoded.unused),
        control_tokens=encoded.controls,
        doubled=encoded.doubled,
        unknown_share=encoded.unknown_tokens / max(1, encoded.tokens),
        notes=tuple(notes),
        skipped=encoded.skipped,
        skipped_rows=encoded.lost,
        truncated_rows=encoded.shortened,
    )


def _bins(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Rows by length, in at most `BINS` bars of equal width."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return tuple(
        (low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(counts)
    )

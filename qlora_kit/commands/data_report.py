"""What `show-data` knows of a data set: counts, lengths, padding, and some rows token by token.

Everything comes from the functions that the training loop calls: the same reading, the same
encoding, the same orders and packs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.config import DataConfig, ShowConfig
from qlora_kit.data.batch import lengths_of, padding_note, padding_share
from qlora_kit.data.cache import cache_directory
from qlora_kit.data.order import epoch_order, grouped_order, make_packs
from qlora_kit.data.prompt import EncodedRows, encode, encode_rows, shared_rows
from qlora_kit.data.read import Row, Rows
from qlora_kit.data.tokens import IGNORE, Encoded, Skipped

BINS = 20
"""Bars of the histogram of lengths."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are alike, and their text."""

    text: str
    trained: bool
    special: bool
    tokens: int


@dataclass(frozen=True)
class ShownRow:
    """One row, or why it is skipped; `part` counts the rows that a long text became."""

    where: str
    part: int
    parts: int
    truncated: bool
    skipped: str | None
    tokens: int
    trained_tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """The counts of the rows that are trained on, or of the held-out ones."""

    source: str
    rows: int
    tokens: int
    supervised_tokens: int
    truncated: int
    cut_tokens: int
    duplicates: int
    skipped: dict[str, int]
    skipped_rows: tuple[tuple[str, str], ...]
    truncated_rows: tuple[tuple[str, int], ...]

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those that are trained on."""
        return self.supervised_tokens / self.tokens


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    model: str
    format: str
    max_length: int
    chat_template: str | None
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

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        flat = asdict(self)
        for name, part in (("train", self.train), ("held_out", self.held_out)):
            if part is not None:
                flat[name]["supervised_share"] = part.supervised_share
        return flat


def report_of(
    rows: Rows,
    config: DataConfig,
    max_length: int,
    options: ShowConfig,
    model: str,
    tokenizer: Any,
) -> Report:
    """Encode the rows of a data set as a run would. Errors: those of encoding."""
    cache, whole = cache_directory(config.token_cache), config.train_on_prompt
    encoded = encode_rows(rows.train, tokenizer, max_length, whole, cache)
    held_out = None
    if rows.evaluation:
        held_out = encode_rows(rows.evaluation, tokenizer, max_length, whole, cache)
    lengths, batch = lengths_of(encoded.rows), options.batch_size
    packs = make_packs(lengths, max_length, options.seed)
    filled = [int(lengths[packs[i]].sum()) for i in epoch_order(len(packs), options.seed, 0)]
    orders = {
        "random": lengths[epoch_order(len(lengths), options.seed, 0)].tolist(),
        "by length": lengths[grouped_order(lengths, batch, batch, options.seed, 0)].tolist(),
        "packed": filled,
    }
    shown = [
        one
        for row in itertools.islice(rows.train, options.rows)
        for one in _shown(row, encode(row, tokenizer, max_length, whole), tokenizer)
    ]
    return Report(
        model=model,
        format=rows.format,
        max_length=max_length,
        chat_template=tokenizer.chat_template if rows.format == "messages" else None,
        batch_size=batch,
        train=_part(encoded, rows.train_source),
        held_out=None if held_out is None else _part(held_out, rows.eval_source),
        held_out_source=rows.eval_source,
        shared=0 if held_out is None else shared_rows(held_out, encoded),
        padding={name: padding_share(order, batch) for name, order in orders.items()},
        packs=len(packs),
        padding_note=padding_note(tokenizer),
        bins=_bins(lengths.tolist()),
        rows=tuple(shown[: options.rows]),
    )


def _part(encoded: EncodedRows, source: str) -> Part:
    return Part(
        source=source,
        rows=len(encoded.rows),
        tokens=encoded.tokens,
        supervised_tokens=encoded.supervised_tokens,
        truncated=encoded.truncated,
        cut_tokens=encoded.cut_tokens,
        duplicates=encoded.duplicates,
        skipped=encoded.skipped,
        skipped_rows=encoded.lost,
        truncated_rows=encoded.shortened,
    )


def _bins(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Rows by length, in at most `BINS` bars of equal width."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return tuple(
        (low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(counts)
    )


def _shown(row: Row, outcome: list[Encoded] | Skipped, tokenizer: Any) -> list[ShownRow]:
    if isinstance(outcome, Skipped):
        return [ShownRow(row.where, 1, 1, False, outcome.reason, 0, 0, (_text_of(row),))]
    return [
        ShownRow(
            where=row.where,
            part=number,
            parts=len(outcome),
            truncated=one.truncated,
            skipped=None,
            tokens=len(one.input_ids),
            trained_tokens=len(one.labels) - one.labels.count(IGNORE),
            pieces=tuple(_pieces(one, tokenizer)),
        )
        for number, one in enumerate(outcome, 1)
    ]


def _text_of(row: Row) -> Piece:
    """A skipped row's text as it was read."""
    content = row.content
    turns = content.get("messages")
    if turns is None:
        text = content.get("text") or content["prompt"] + content["completion"]
    else:
        text = "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in turns)
    return Piece(text, trained=False, special=False, tokens=0)


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
        text = _decoded(tokenizer, row.input_ids[:done])
        pieces.append(Piece(text[len(before) :], kind[0], kind[1], size))
        before = text
    return pieces


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    # Without the clean-up of spaces, which rewrites text that is shown already.
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

"""Rows to batches: padding and packing.

There is no attention mask: rows are padded on the right and attention is causal, so that no real
token sees a padded one, and padded positions are in no loss. Rows of a pack are told apart by
`position_ids`, which begin at 0 with each, and by their lengths, which the host knows: attention
isolates them by these where it is ours, and by positions where it is the library's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from qlora_kit.data.token_rows import TokenRows
from qlora_kit.data.tokens import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LENGTH_MULTIPLE = 16
"""Matrix units like such lengths, and a CPU library keeps a compiled kernel for each length."""


class Batch(TypedDict):
    """One micro-batch of B sequences, padded to T tokens; int64 unless said otherwise.

    T is the longest sequence's length, rounded up to a multiple of `LENGTH_MULTIPLE`.
    """

    input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T), -100 where nothing is trained on, padding included"""
    position_ids: Tensor
    """(B, T), counted from 0 in each row of a sequence; the padding of a pack counts on its own"""
    supervised: Tensor
    """(N,), flat indices b * T + t of the positions whose next token is trained on"""
    num_supervised: int
    """N, known without reading the device"""
    lengths: list[int]
    """tokens of each sequence, padding left out"""
    packed: bool
    """whether a sequence may hold several rows"""
    row_lengths: list[list[int]]
    """of the rows of each sequence, T in all; a pack's padding is a row of its own"""
    row_starts: Tensor
    """(R + 1,) int32: where each of the R rows begins in the batch, and B * T (`cu_seqlens`)"""
    host_ids: NotRequired[Tensor]
    """`input_ids` as the host has them, of a batch that is on a device"""
    reference: NotRequired[Tensor]
    """of pairs of rows, the log-probability that the reference gives each row: (B,) fp32"""
    answered: NotRequired[list[int]]
    """of pairs of rows, the supervised tokens of each row, N in all"""


PAIR = 2
"""Rows of a pair, one beside the other in a batch."""


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch of `rows`, in their order; needs at least one row."""
    return collate_packs([[row] for row in rows], pad_id)


def collate_packs(packs: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """One batch whose sequences are the rows of each pack, one after the other."""
    lengths = [sum(len(row.input_ids) for row in pack) for pack in packs]
    width = padded(max(lengths))
    input_ids = torch.full((len(packs), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(packs), width), IGNORE, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(packs), 1)
    row_lengths = [_lengths_within(width, pack) for pack in packs]
    for index, pack in enumerate(packs):
        done = 0
        for row in pack:
            until = done + len(row.input_ids)
            input_ids[index, done:until] = torch.tensor(row.input_ids)
            # What a row begins with is predicted by nothing, least of all by the row before.
            labels[index, done + 1 : until] = torch.tensor(row.labels[1:])
            position_ids[index, done:until] = torch.arange(until - done)
            done = until
        if len(pack) > 1:
            position_ids[index, done:] = torch.arange(width - done)
    return _batch(input_ids, labels, position_ids, lengths, row_lengths)


def _batch(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    lengths: list[int],
    row_lengths: list[list[int]],
) -> Batch:
    """A batch with what follows from its tokens."""
    supervised = _predicting(labels)
    ends = itertools.accumulate(itertools.chain.from_iterable(row_lengths), initial=0)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        supervised=supervised,
        num_supervised=len(supervised),
        lengths=lengths,
        packed=any(len(one) > 1 for one in row_lengths),
        row_lengths=row_lengths,
        row_starts=torch.tensor(list(ends), dtype=torch.int32),
    )


def collate_pairs(rows: Sequence[Encoded], reference: Tensor, pad_id: int) -> Batch:
    """One batch of pairs, chosen, rejected, chosen ...; `reference` has a number for each row."""
    return _with_pairs(collate(rows, pad_id), reference)


def _with_pairs(batch: Batch, reference: Tensor) -> Batch:
    batch["reference"] = reference
    batch["answered"] = (batch["labels"] != IGNORE).sum(1).tolist()
    return batch


def rows_together(batch: Batch) -> int:
    """Rows of a batch that cannot be in different ones."""
    return PAIR if "reference" in batch else 1


def padded(length: int) -> int:
    """The width of a batch whose longest sequence has `length` tokens."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def padding_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What is said of a tokenizer without a pad token, or with one that also ends a turn."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return None
    how = "no pad token: padding with" if pad is None else "the pad token is also"
    end = "EOS" if eos is not None else f"token {padding_id(tokenizer)}"
    return f"{how} {end}; padding is never trained on, and every end of a turn is"


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are padded with: the pad token, else EOS, else 0; no loss and no token sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def split(batch: Batch, max_rows: int) -> Iterator[Batch]:
    """The same sequences in batches of at most `max_rows`, each as wide as it has to be.

    Pairs stay together, where `max_rows` are fewer too.
    """
    together = rows_together(batch)
    max_rows = max(together, max_rows // together * together)
    for first in range(0, len(batch["lengths"]), max_rows):
        lengths = batch["lengths"][first : first + max_rows]
        rows, width = slice(first, first + max_rows), padded(max(lengths))
        part = _batch(
            batch["input_ids"][rows, :width].contiguous(),
            batch["labels"][rows, :width].contiguous(),
            batch["position_ids"][rows, :width].contiguous(),
            lengths,
            [_cut(one, width) for one in batch["row_lengths"][rows]],
        )
        if "reference" in batch:
            part = _with_pairs(part, batch["reference"][rows].contiguous())
        yield part


def _lengths_within(width: int, pack: Sequence[Encoded]) -> list[int]:
    """The rows of a pack by their lengths; the padding goes on in a row that is alone."""
    lengths = [len(row.input_ids) for row in pack]
    left = width - sum(lengths)
    if len(lengths) == 1:
        return [width]
    return [*lengths, left] if left else lengths


def _cut(lengths: Sequence[int], width: int) -> list[int]:
    """The lengths of a sequence's rows where only its first `width` positions are left."""
    found: list[int] = []
    for length in lengths:
        if (left := width - sum(found)) > 0:
            found.append(min(length, left))
    return found


def _predicting(labels: Tensor) -> Tensor:
    """Flat indices of the positions whose next token is trained on; the last predicts nothing."""
    predicts = torch.zeros(labels.shape, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    return predicts.flatten().nonzero().squeeze(1)


def lengths_of(rows: Sequence[Encoded]) -> np.ndarray:
    """The tokens of each row, as int32, without reading rows that are on disk."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32)


def eval_batches(
    rows: Sequence[Encoded], batch_size: int, pad_id: int, most_tokens: int | None = None
) -> Iterator[Batch]:
    """Every row once, shortest first: rows of like length waste little padding.

    Batches of several rows have at most `most_tokens` tokens, padding included.
    """
    for chosen in batches_by_length(lengths_of(rows), batch_size, most_tokens):
        yield collate([rows[i] for i in chosen], pad_id)


def eval_pairs(
    rows: Sequence[Encoded],
    reference: Tensor,
    batch_size: int,
    pad_id: int,
    most_tokens: int | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """As `eval_batches`, of pairs: `batch_size` of them; each batch with the rows that it has."""
    lengths = lengths_of(rows).reshape(-1, PAIR).max(1)
    most = None if most_tokens is None else most_tokens // PAIR
    for pairs in batches_by_length(lengths, batch_size, most):
        chosen = [PAIR * pair + side for pair in pairs for side in range(PAIR)]
        yield chosen, collate_pairs([rows[i] for i in chosen], reference[chosen], pad_id)


def batches_by_length(
    lengths: np.ndarray, batch_size: int, most_tokens: int | None = None
) -> Iterator[list[int]]:
    """The places of `lengths`, shortest first, in batches; several have `most_tokens` at most."""
    order = np.argsort(lengths, kind="stable").tolist()
    chosen: list[int] = []
    for row in order:
        size = (len(chosen) + 1) * padded(int(lengths[row]))
        full = len(chosen) == batch_size or (most_tokens is not None and size > most_tokens)
        if chosen and full:
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen

"""Rows to token ids and labels: what the model reads, and which tokens it learns to write.

Texts are tokenized many at a time; `labels.py` says what is trained on in each row. A row that
cannot be trained on is skipped, with the reason; no row is lost in silence, and where more than
half of them are lost the rows are refused.

Each answer of a pair becomes a row of its own, in which the answer alone is trained on: an even
place has the chosen one, the odd place behind it the rejected one. Where one is skipped the pair
is, and a prompt that is too long for one loses as much of its beginning in the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.answers import chat_ids
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions
from qlora_kit.data.labels import (
    DROPPED,
    LONGER,
    REMEDIES,
    TOO_LONG,
    TOO_LONG_ANSWER,
    encode_chat,
    encode_completion,
    encode_text,
)
from qlora_kit.data.outcome import DEFAULT_RULES, EncodedRows, EncodeRules, Outcome
from qlora_kit.data.pairs import SIDES, is_pair
from qlora_kit.data.rows import Row
from qlora_kit.data.token_cache import cached, encoding_key, id_limit
from qlora_kit.data.token_rows import Entry
from qlora_kit.data.tokens import PIECE, Encoded, Ids, Skipped, Tokens
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BATCH_ROWS, BATCH_CHARACTERS = 1000, 1024**2
"""Rows that are tokenized together; the fewer, the longer their texts."""


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rules: EncodeRules = DEFAULT_RULES,
    cache: Path | None = None,
    refuse: bool = True,
) -> EncodedRows:
    """Every row encoded, in order; `DataError` where more than half of them are lost.

    The tokens are kept on disk: in `cache`, where the same rows, tokenizer and settings find them
    again, or else in a file that goes with the result. Without `refuse` a loss of rows is no error.
    """
    tokens = Tokens(tokenizer)
    rules = rules.dated(tokenizer)
    key = encoding_key(rows, tokenizer, max_length, rules) if cache else None
    wanted = Entry(key, max_length, lambda: id_limit(tokenizer)) if key else None
    make = lambda: _outcomes(rows, tokens, max_length, rules)  # noqa: E731
    kept = cached(cache, wanted, make, tokens.unknown)
    facts = kept.facts
    if not facts["source_rows"]:
        raise DataError("there are no rows to encode", "give at least one row")
    encoded = EncodedRows.of(kept.rows, facts, _refusal(facts, max_length))
    if refuse and encoded.refusal is not None:
        raise encoded.refusal
    return encoded


def _refusal(facts: dict[str, Any], max_length: int) -> DataError | None:
    """Why rows of which so many are lost are not trained on."""
    skipped, source_rows = Counter(facts["skipped"]), facts["source_rows"]
    num_lost = skipped.total()
    # Who asks for long rows to be dropped knows that they are.
    unasked = num_lost - skipped[DROPPED]
    if facts["rows"] and unasked <= source_rows / 2:
        return None
    ((reason, _),) = skipped.most_common(1)
    counts = ", ".join(f"{why}: {count}" for why, count in skipped.most_common())
    remedy = {**REMEDIES, **PAIR_REMEDIES}[reason.partition(": ")[0]]
    whole = source_rows - num_lost - facts["truncated"]
    if reason in (TOO_LONG, TOO_LONG_ANSWER) and whole:
        remedy = f"{remedy}, or train on the others with --long_rows drop"
    return DataError(
        f"{facts['lost'][0][0]}: {num_lost} of {source_rows} rows, from here on, cannot be trained "
        f"on ({counts}; max_length {max_length})",
        remedy,
    )


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rules: EncodeRules = DEFAULT_RULES,
) -> list[Encoded] | Skipped:
    """One row as ids and labels of at most `max_length` tokens, at least one of them trained on.

    Most rows give one; a long text and a chat whose template rewrites earlier turns give several.
    `TokenizerError` where the tokenizer cannot say where a row or a turn ends.
    """
    (outcome,) = _outcomes([row], Tokens(tokenizer), max_length, rules)
    return list(outcome.encodings) if outcome.skipped is None else Skipped(outcome.skipped)


def prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    literal: bool = False,
    options: ChatOptions = NO_OPTIONS,
    limit: int | None = None,
) -> list[int]:
    """The ids that training puts before a completion, or before the answer to a first message.

    `literal` as in `Tokens.read_many`; a chat's message is always literal. Of more ids than
    `limit` the first ones are given, and perhaps not all.
    """
    if chat:
        return chat_ids([{"role": "user", "content": prompt}], tokenizer, options, limit=limit)
    tokens = Tokens(tokenizer)
    ids = tokens.read_long(prompt, literal, limit)
    if limit is not None and len(ids) > limit:
        return [*tokens.start, *ids]  # without more than a start, perhaps
    return [*tokens.start, *tokens.without_start(ids)[0]]


def _outcomes(
    rows: Iterable[Row], tokens: Tokens, max_length: int, rules: EncodeRules
) -> Iterator[Outcome]:
    """What becomes of each row, in order."""
    for batch in _batches(rows):
        ids = _texts([part for row in batch for part in parts_of_row(row)], tokens, max_length)
        for row in batch:
            found = [_outcome(part, ids, tokens, max_length, rules) for part in parts_of_row(row)]
            yield paired(row, len(tokens.start), *found) if is_pair(row.content) else found[0]


def _outcome(
    row: Row,
    ids: dict[tuple[str, bool, bool], Ids],
    tokens: Tokens,
    max_length: int,
    rules: EncodeRules,
) -> Outcome:
    """What becomes of one row; `ids` are those of its texts."""
    if "messages" in row.content:
        return encode_chat(row, tokens, max_length, rules)
    if "text" in row.content:
        ids_of = ids[row.content["text"], row.literal, False]
        return encode_text(row, ids_of, tokens, max_length, rules)
    prompt = ids[row.content["prompt"], row.literal, False]
    answer = ids[row.content["completion"], row.literal, bool(row.content["prompt"])]
    return encode_completion(row, prompt, answer, tokens, max_length, rules)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in parts that are not too much for the memory."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(
            len(text)
            for part in parts_of_row(row)
            for text in part.content.values()
            if isinstance(text, str)
        )
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts(
    rows: Sequence[Row], tokens: Tokens, max_length: int
) -> dict[tuple[str, bool, bool], Ids]:
    """Ids of the texts of some rows; of a prompt or a completion that is too long, not all.

    The keys are text, whether its control tokens are literal, and whether it stands behind another.
    Short texts are tokenized many at a time; a long one comes in pieces.
    """
    asked: dict[tuple[bool, bool], dict[str, None]] = {}
    whole = set()
    for row in rows:
        for name in ("text", "prompt", "completion"):
            if name in row.content:
                text = row.content[name]
                # Behind nothing, a completion is the beginning of the text.
                behind = name == "completion" and bool(row.content["prompt"])
                asked.setdefault((row.literal, behind), {})[text] = None
                if name == "text":
                    whole.add(text)
    ids: dict[tuple[str, bool, bool], Ids] = {}
    for (literal, behind), texts in asked.items():
        short = [text for text in texts if len(text) <= PIECE]
        found = tokens.read_many(short, literal, behind)
        for text, one in zip(short, found, strict=True):
            ids[text, literal, behind] = one
        for text in texts:
            if len(text) > PIECE:
                # One token more than fits is enough to know that it does not.
                limit = None if text in whole else max_length + 1
                ids[text, literal, behind] = tokens.read_long(text, literal, limit, behind)
    return ids


SAME = "chosen and rejected are the same"
EMPTY = "chosen or rejected is empty"
CUT_ANSWER = "chosen or rejected does not fit into max_length"
SEVERAL = "a chat that its template writes as several"
"""Why a pair is skipped, beside the reasons of `labels.py`."""

PAIR_REMEDIES = {
    SAME: "give each row two different answers",
    EMPTY: "give every row two answers",
    CUT_ANSWER: f"{LONGER} or shorten the chats",
    SEVERAL: "use a chat template that writes earlier turns as they were (--chat_template)",
}
"""What to do about each of these reasons."""


def parts_of_row(row: Row) -> tuple[Row, ...]:
    """The rows that a row is encoded as: those of its answers, or itself."""
    if not is_pair(row.content):
        return (row,)
    return tuple(replace(row, content=row.content[side]) for side in SIDES)


def paired(row: Row, start: int, chosen: Outcome, rejected: Outcome) -> Outcome:
    """What becomes of a pair, from what would become of its answers.

    `start` tokens at the beginning of each are no part of a prompt.
    """
    outcomes = (chosen, rejected)
    unused = dict.fromkeys(name for one in outcomes for name in one.row.unused)
    row = replace(row, unused=tuple(unused))

    def lost(reason: str) -> Outcome:
        return Outcome(row, skipped=reason)

    if any(_is_empty(row.content[side]) for side in SIDES):
        return lost(EMPTY)
    for one in outcomes:
        if one.skipped is not None:
            return lost(one.skipped)
    rows = [list(one.encodings) for one in outcomes]
    if any(len(one) != 1 for one in rows):
        return lost(SEVERAL)
    if "messages" in row.content["chosen"] and any(one.cut for one in outcomes):
        return lost(CUT_ANSWER)
    most = max(one.cut_tokens for one in outcomes)
    encoded = [
        _without(one, start, most - outcome.cut_tokens)
        for (one,), outcome in zip(rows, outcomes, strict=True)
    ]
    if encoded[0].input_ids == encoded[1].input_ids:
        return lost(SAME)
    return Outcome(
        row,
        encoded,
        cut=chosen.cut or rejected.cut,
        cut_tokens=most * len(SIDES),
        controls=sum(one.controls for one in outcomes),
        doubled=sum(one.doubled for one in outcomes),
    )


def _is_empty(answer: dict[str, Any]) -> bool:
    if "messages" not in answer:
        return not answer["completion"]
    own = answer["messages"][-answer["answer_messages"] :]
    return not any(one.get("content") or one.get("tool_calls") for one in own)


def _without(row: Encoded, start: int, count: int) -> Encoded:
    """A row without the first `count` tokens behind its start: those of its prompt."""
    if not count:
        return row
    ids, labels = row.input_ids, row.labels
    behind = start + count
    return Encoded([*ids[:start], *ids[behind:]], [*labels[:start], *labels[behind:]], True)

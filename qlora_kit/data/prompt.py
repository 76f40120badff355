"""A row to token ids and labels: what the model reads, and which tokens it learns to write.

Every sequence starts with what the tokenizer puts before a text (one BOS, or none), and a label is
the token itself where it is trained on, else -100; the first token has nothing before it that
could predict it, so its label is always -100.

- text: start + text + EOS, all of it trained on. A longer one becomes several rows, each with the
  start (or, where there is none, with the last token of the row before), so that every token is
  trained on once.
- prompt, completion: start + prompt + completion + EOS; completion and EOS are trained on. The two
  are tokenized apart: a token across the border would be one that generation, which is handed the
  prompt alone, could never begin with. Where both are too long together, the prompt loses its
  beginning, never the completion its end.
- messages: the chat template's text (`mask.py`); every assistant turn is trained on, its end token
  too. A longer chat ends with the last turn that fits whole.

A row that cannot be trained on is skipped, with the reason; no row is lost in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.cache import Outcome, TokenRows, cached, encoding_key
from qlora_kit.data.mask import LEFT_OUT, NO_TURN, Chat, chats, header_text
from qlora_kit.data.read import Row
from qlora_kit.data.tokens import IGNORE, Encoded, Skipped, Tokens
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt longer than max_length"
TOO_LONG_ANSWER = "completion longer than max_length"
ONE_TOKEN = "a single token"
CONTROL = "a control token that cannot be taken apart"
INSIDE = "a turn begins or ends inside a token"
REMEDIES = {
    TOO_LONG: "raise --max_length or shorten the prompts",
    TOO_LONG_ANSWER: "raise --max_length or shorten the completions",
    NO_TURN: "give every conversation an assistant turn of weight 1",
    ONE_TOKEN: "give longer rows",
    CONTROL: "take the control tokens out of the messages' text",
    INSIDE: "take blanks off the ends of the messages, or use rows of prompt and completion",
    LEFT_OUT: "use a template (--chat_template) that writes all of the rows' roles and fields",
}
"""What to do about each reason for skipping a row."""

BATCH_ROWS, BATCH_CHARACTERS = 1000, 1024**2
"""Rows that are tokenized together; the fewer, the longer their texts."""


@dataclass(frozen=True)
class EncodedRows:
    """The rows that are trained on, and what became of the others."""

    rows: Sequence[Encoded]
    skipped: dict[str, int]
    truncated: int
    tokens: int
    supervised_tokens: int
    cut_tokens: int = 0
    """tokens that truncation took away"""
    duplicates: int = 0
    """rows that are equal to an earlier one"""
    lost: tuple[tuple[str, str], ...] = ()
    """`file:line` and reason of the first skipped rows"""
    shortened: tuple[tuple[str, int], ...] = ()
    """`file:line` of the first truncated rows, and how many tokens each lost; 0: cut in rows"""


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_prompt: bool = False,
    cache: Path | None = None,
) -> EncodedRows:
    """Every row encoded, in order; `DataError` where more than half of them are lost.

    The tokens are kept on disk: in `cache`, where the same rows, tokenizer and settings find them
    again, or else in a file that goes with the result.
    """
    tokens = Tokens(tokenizer)
    key = encoding_key(rows, tokenizer, max_length, train_on_prompt) if cache else None
    kept = cached(cache, key, lambda: _outcomes(rows, tokens, max_length, train_on_prompt))
    facts = kept.facts
    if not facts["source_rows"]:
        raise DataError("there are no rows to encode", "give at least one row")
    skipped = Counter(facts["skipped"])
    num_lost = sum(skipped.values())
    if not len(kept.rows) or num_lost > facts["source_rows"] / 2:
        counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        raise DataError(
            f"{facts['lost'][0][0]}: {num_lost} of {facts['source_rows']} rows, from here on, "
            f"cannot be trained on ({counts}; max_length {max_length})",
            REMEDIES[skipped.most_common(1)[0][0]],
        )
    return EncodedRows(
        rows=kept.rows,
        skipped=dict(skipped),
        truncated=facts["truncated"],
        tokens=facts["tokens"],
        supervised_tokens=facts["supervised_tokens"],
        cut_tokens=facts["cut_tokens"],
        duplicates=facts["duplicates"],
        lost=tuple((where, reason) for where, reason in facts["lost"]),
        shortened=tuple((where, cut) for where, cut in facts["shortened"]),
    )


def shared_rows(one: EncodedRows, other: EncodedRows) -> int:
    """How many rows of `one` are also in `other`."""
    assert isinstance(one.rows, TokenRows)
    assert isinstance(other.rows, TokenRows)
    return int(np.isin(one.rows.digests, other.rows.digests).sum())


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False
) -> list[Encoded] | Skipped:
    """One row as ids and labels of at most `max_length` tokens, at least one of them trained on.

    Most rows give one; a long text and a chat whose template rewrites earlier turns give several.
    `TokenizerError` where the tokenizer cannot say where a row or a turn ends.
    """
    ((_, outcome, _),) = _outcomes([row], Tokens(tokenizer), max_length, train_on_prompt)
    return outcome


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[int]:
    """The ids that training puts before a completion, or before the answer to a first message."""
    tokens = Tokens(tokenizer)
    if not chat:
        return [*tokens.start, *tokens.plain(prompt)]
    encoded = tokens.chat(*header_text(prompt, tokens))
    if encoded is None:
        raise DataError(f"prompt: {CONTROL}", "leave the control token out")
    return tokens.one_start(encoded[0], [False] * len(encoded[0]))[0]


def _outcomes(
    rows: Iterable[Row], tokens: Tokens, max_length: int, train_on_prompt: bool
) -> Iterator[Outcome]:
    """`(row, its encodings or why it is skipped, tokens cut)` of each row, in order."""
    for batch in _batches(rows):
        # Texts are tokenized many at a time; rows of chats need the places of their tokens.
        texts = [
            text
            for row in batch
            for text in (row.content.get("prompt"), row.content.get("completion"))
            if text is not None
        ] + [row.content["text"] for row in batch if "text" in row.content]
        ids = dict(zip(texts, tokens.plain_many(texts), strict=True))
        for row in batch:
            content = row.content
            if "messages" in content:
                yield row, *_messages(row, tokens, max_length, train_on_prompt)
            elif "text" in content:
                end = [] if content.get("goes_on") else [tokens.eos]
                yield row, _text([*ids[content["text"]], *end], tokens.start, max_length), 0
            else:
                answer = [*ids[content["completion"]], tokens.eos]
                prompt = ids[content["prompt"]]
                yield row, *_pair(prompt, answer, tokens.start, max_length, train_on_prompt)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in parts that are not too much for the memory."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(text) for text in row.content.values() if isinstance(text, str))
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text(ids: list[int], start: list[int], max_length: int) -> list[Encoded] | Skipped:
    """All of a text in rows of at most `max_length`; each token is trained on once."""
    if len(start) + len(ids) < 2:
        return Skipped(ONE_TOKEN)
    rows: list[Encoded] = []
    cut = len(start) + len(ids) > max_length
    # Without a start, the last token of one row is the first of the next, which it predicts.
    done = 0 if start else 1
    while done < len(ids):
        context = start or ids[done - 1 : done]
        part = ids[done : done + max(1, max_length - len(context))]
        done += len(part)
        rows.append(Encoded([*context, *part], [IGNORE] * len(context) + part, cut))
    return rows


def _pair(
    prompt: list[int], answer: list[int], start: list[int], max_length: int, train_on_prompt: bool
) -> tuple[list[Encoded] | Skipped, int]:
    """A prompt and what follows it, and how many tokens of the prompt were cut."""
    fixed = max(1, len(start))
    length = len(start) + len(prompt) + len(answer)
    if length < 2:
        return Skipped(ONE_TOKEN), 0
    if len(start) + len(prompt) >= max_length:
        return Skipped(TOO_LONG), 0
    surplus = max(0, length - max_length)
    # The completion must keep something of its prompt, where there is one.
    if surplus and surplus >= len(prompt):
        return Skipped(TOO_LONG_ANSWER), 0
    ids = [*start, *prompt[surplus:], *answer]
    untrained = fixed if train_on_prompt else max(fixed, len(ids) - len(answer))
    labels = [IGNORE] * untrained + ids[untrained:]
    return [Encoded(ids, labels, surplus > 0)], surplus


def _messages(
    row: Row, tokens: Tokens, max_length: int, train_on_prompt: bool
) -> tuple[list[Encoded] | Skipped, int]:
    """A chat, or the several that a template makes of it, and how many tokens were cut."""
    found = chats(row, tokens)
    if isinstance(found, Skipped):
        return found, 0
    results = [_chat(chat, tokens, max_length, train_on_prompt) for chat in found]
    rows = [result for result, _ in results if isinstance(result, Encoded)]
    cut = sum(tokens_cut for _, tokens_cut in results)
    reasons = [result for result, _ in results if isinstance(result, Skipped)]
    if not rows:
        return reasons[0], 0
    if reasons:
        # Later turns of a chat that was taken apart: the row as a whole is a truncated one.
        rows = [Encoded(row.input_ids, row.labels, True) for row in rows]
    return rows, cut


def _chat(
    chat: Chat, tokens: Tokens, max_length: int, train_on_prompt: bool
) -> tuple[Encoded | Skipped, int]:
    """One rendered chat, cut behind the last turn that fits, and how many tokens that took away."""
    encoded = tokens.chat(chat.text, chat.literals)
    if encoded is None:
        return Skipped(CONTROL), 0
    ids, places = encoded
    trained = [False] * len(ids)
    ends = []
    for turn in chat.turns:
        first, last = turn.span
        if any(a < border < b for a, b in places for border in (first, last)):
            return Skipped(INSIDE), 0
        inside = [i for i, (a, b) in enumerate(places) if first <= a < last and b > first]
        if not inside or not turn.trained:
            continue
        for index in inside:
            trained[index] = True
        ends.append(inside[-1] + 1)
    before = len(ids)
    ids, trained = tokens.one_start(ids, trained)
    shift = len(ids) - before
    length = len(ids)
    if length > max_length:
        length = max((end + shift for end in ends if end + shift <= max_length), default=0)
        if not length:
            begins = trained.index(True) if True in trained else len(ids)
            return Skipped(TOO_LONG if begins >= max_length else TOO_LONG_ANSWER), 0
    fixed = max(1, len(tokens.start))
    labels = [
        token if (train_on_prompt or learn) and place >= fixed else IGNORE
        for place, (token, learn) in enumerate(zip(ids[:length], trained[:length], strict=True))
    ]
    if labels.count(IGNORE) == len(labels):
        return Skipped(ONE_TOKEN), 0
    return Encoded(ids[:length], labels, length < len(ids)), len(ids) - length

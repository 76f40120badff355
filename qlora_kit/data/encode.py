"""A row to token ids and labels: what the model reads, and which tokens it learns to write.

Every sequence starts with what the tokenizer puts before a text (one BOS, or none), and a label is
the token itself where it is trained on, else -100; the first token has nothing before it that
could predict it, so its label is always -100.

Control tokens that rows of text, prompt and completion spell are read as tokens, for such rows were
often written by a chat template; a start or an end that a row spells is not written again.

- text: start + text + EOS, all of it trained on. A longer one becomes several rows, each with the
  start (or, where there is none, with the last token of the row before), so that every token is
  trained on once.
- prompt, completion: start + prompt + completion + EOS; completion and EOS are trained on. The two
  are tokenized apart: a token across the border would be one that generation, which is handed the
  prompt alone, could never begin with. Their ids decode to both texts and nothing between. Where
  both are too long together, the prompt loses its beginning, never the completion its end.
- messages: the chat template's text (`chat_mask.py`); every assistant turn is trained on, its end
  token too, and a token that reaches across its border. A longer chat ends with the last turn that
  fits whole.

A row that cannot be trained on is skipped, with the reason; no row is lost in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_kit.data.answers import chat_ids
from qlora_kit.data.chat_mask import LEFT_OUT, NO_TURN, Chat, chats
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions, date_of
from qlora_kit.data.outcome import DEFAULT_RULES, EncodeRules, Outcome
from qlora_kit.data.rows import Row, is_document
from qlora_kit.data.token_cache import Entry, cached, encoding_key, id_limit
from qlora_kit.data.token_rows import TokenRows
from qlora_kit.data.tokens import IGNORE, PIECE, Encoded, Ids, Skipped, Tokens
from qlora_kit.data.turns import unread
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt longer than max_length"
TOO_LONG_ANSWER = "completion longer than max_length"
DROPPED = "longer than max_length"
ONE_TOKEN = "a single token"
CONTROL = "a control token that cannot be taken apart"
LONGER = "raise --max_length (beyond the model's context with --allow_longer_context)"
REMEDIES = {
    TOO_LONG: f"{LONGER} or shorten the prompts",
    TOO_LONG_ANSWER: f"{LONGER} or shorten the completions",
    DROPPED: f"{LONGER}, or give --long_rows truncate",
    NO_TURN: "give every conversation an assistant turn of weight 1",
    ONE_TOKEN: "give longer rows",
    CONTROL: "take the control tokens out of the messages' text",
    LEFT_OUT: "use a template that writes all of the rows' roles and fields: another model's, or a "
    "file (--chat_template FILE)",
}
"""What to do about each reason for skipping a row; details may follow the reason's colon."""

CUT_PROMPT = "the beginning of the prompt"
CUT_TURNS = "the last turns"
CUT_TEXT = "nothing: the text is cut into several rows"
"""What truncation takes from a row."""

TOKEN_CHARACTERS = 256
"""Characters of the longest token, twice over: vocabularies have runs of 128 blanks."""

MARGIN = 16
"""Tokens beyond `max_length` that a chat is tokenized to: several starts become one."""

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
    rules = replace(rules, chat_date=date_of(tokenizer, rules.chat_date))
    key = encoding_key(rows, tokenizer, max_length, rules) if cache else None
    wanted = Entry(key, max_length, lambda: id_limit(tokenizer)) if key else None
    make = lambda: _outcomes(rows, tokens, max_length, rules)  # noqa: E731
    kept = cached(cache, wanted, make, tokens.unknown)
    facts = kept.facts
    if not facts["source_rows"]:
        raise DataError("there are no rows to encode", "give at least one row")
    names = ("skipped", "truncated", "tokens", "supervised_tokens", "cut_tokens", "duplicates")
    encoded = EncodedRows(
        rows=kept.rows,
        **{name: facts[name] for name in (*names, "controls", "doubled", "unknown_tokens")},
        cut=tuple((what, *counts) for what, counts in facts["cut"].items()),
        unused=tuple(facts["unused"].items()),
        lost=tuple((where, reason) for where, reason in facts["lost"]),
        shortened=tuple((where, cut) for where, cut in facts["shortened"]),
        refusal=_refusal(facts, max_length),
    )
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
    remedy = REMEDIES[reason.partition(": ")[0]]
    whole = source_rows - num_lost - facts["truncated"]
    if reason in (TOO_LONG, TOO_LONG_ANSWER) and whole:
        remedy = f"{remedy}, or train on the others with --long_rows drop"
    return DataError(
        f"{facts['lost'][0][0]}: {num_lost} of {source_rows} rows, from here on, cannot be trained "
        f"on ({counts}; max_length {max_length})",
        remedy,
    )


def shared_rows(one: EncodedRows, other: EncodedRows) -> int:
    """How many rows of `one` are also in `other`."""
    assert isinstance(one.rows, TokenRows)
    assert isinstance(other.rows, TokenRows)
    return int(np.isin(one.rows.digests, other.rows.digests).sum())


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
) -> list[int]:
    """The ids that training puts before a completion, or before the answer to a first message.

    `literal` as in `Tokens.read_many`; a chat's message is always literal.
    """
    if chat:
        return chat_ids([{"role": "user", "content": prompt}], tokenizer, options)
    tokens = Tokens(tokenizer)
    (ids,) = tokens.read_many([prompt], literal)
    return [*tokens.start, *tokens.without_start(ids)[0]]


def _outcomes(
    rows: Iterable[Row], tokens: Tokens, max_length: int, rules: EncodeRules
) -> Iterator[Outcome]:
    """What becomes of each row, in order."""
    for batch in _batches(rows):
        ids = _texts(batch, tokens, max_length)
        for row in batch:
            if "messages" in row.content:
                yield _messages(row, tokens, max_length, rules)
            elif "text" in row.content:
                ids_of = ids[row.content["text"], row.literal, False]
                yield _text(row, ids_of, tokens, max_length, rules)
            else:
                prompt = ids[row.content["prompt"], row.literal, False]
                answer = ids[row.content["completion"], row.literal, bool(row.content["prompt"])]
                yield _pair(row, prompt, answer, tokens, max_length, rules)


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


def _text(row: Row, ids: Ids, tokens: Tokens, max_length: int, rules: EncodeRules) -> Outcome:
    """All of a text in rows of at most `max_length`; each token is trained on once."""
    controls = tokens.count_controls(ids)
    ids, doubled = tokens.without_start(ids)
    if not row.content.get("goes_on"):
        ids, again = tokens.with_end(ids, row.content["text"])
        doubled += again
    start = tokens.start
    length = len(start) + len(ids)
    if length < 2:
        return Outcome(row, skipped=ONE_TOKEN)
    # A document is cut into rows by what it is.
    if (
        length > max_length
        and not is_document(row.source)
        and _drops(row, length, max_length, rules)
    ):
        return Outcome(row, skipped=DROPPED)
    cut = CUT_TEXT if length > max_length else None
    rows = _parts(ids, start, max_length)
    return Outcome(row, rows, cut=cut, controls=controls, doubled=doubled)


def _parts(ids: Ids, start: list[int], max_length: int) -> Iterator[Encoded]:
    cut = len(start) + len(ids) > max_length
    # Without a start, the last token of one row is the first of the next, which it predicts.
    done = 0 if start else 1
    while done < len(ids):
        context = start or list(ids[done - 1 : done])
        part = list(ids[done : done + max(1, max_length - len(context))])
        done += len(part)
        yield Encoded([*context, *part], [IGNORE] * len(context) + part, cut)


def _pair(
    row: Row,
    prompt: Ids,
    answer: Ids,
    tokens: Tokens,
    max_length: int,
    rules: EncodeRules,
) -> Outcome:
    """A prompt and what follows it; where both are too long, the prompt loses its beginning."""
    start, fixed = tokens.start, max(1, len(tokens.start))
    controls = tokens.count_controls(prompt) + tokens.count_controls(answer)
    prompt, doubled = tokens.without_start(prompt)
    if not prompt:
        answer, again = tokens.without_start(answer)
        doubled += again
    answer, again = tokens.with_end(answer, row.content["completion"])
    length = len(start) + len(prompt) + len(answer)
    if length < 2:
        return Outcome(row, skipped=ONE_TOKEN)
    if length > max_length and _drops(row, length, max_length, rules):
        return Outcome(row, skipped=DROPPED)
    if len(start) + len(prompt) >= max_length:
        return Outcome(row, skipped=TOO_LONG)
    surplus = max(0, length - max_length)
    # The completion must keep something of its prompt, where there is one.
    if surplus and surplus >= len(prompt):
        return Outcome(row, skipped=TOO_LONG_ANSWER)
    ids = [*start, *prompt[surplus:], *answer]
    untrained = fixed if rules.train_on_prompt else max(fixed, len(ids) - len(answer))
    labels = [IGNORE] * untrained + ids[untrained:]
    return Outcome(
        row,
        [Encoded(ids, labels, surplus > 0)],
        cut=CUT_PROMPT if surplus else None,
        cut_tokens=surplus,
        controls=controls,
        doubled=doubled + again,
    )


def _messages(row: Row, tokens: Tokens, max_length: int, rules: EncodeRules) -> Outcome:
    """A chat, or the several that a template makes of it."""
    given = row.content["messages"]
    messages = _reachable(given, max_length)
    cut = len(messages) < len(given)
    if cut:
        if _drops(row, max_length + 1, max_length, rules):
            return Outcome(row, skipped=DROPPED)
        if not any(one["role"] == "assistant" and one.get("weight", 1) for one in messages):
            return Outcome(row, skipped=TOO_LONG)
    template = str(tokens.tokenizer.chat_template)
    row = replace(row, unused=(*row.unused, *unread(messages, template)))
    part = replace(row, content={**row.content, "messages": messages}) if cut else row
    found = chats(part, tokens, rules.chat)
    if isinstance(found, Skipped):
        return Outcome(row, skipped=found.reason)
    results = [_chat(row, chat, tokens, max_length, rules) for chat in found]
    rows = [result for result, _ in results if isinstance(result, Encoded)]
    reasons = [result.reason for result, _ in results if isinstance(result, Skipped)]
    if not rows or DROPPED in reasons:
        return Outcome(row, skipped=DROPPED if DROPPED in reasons else reasons[0])
    # Where later turns of a chat that was taken apart are lost, the row as a whole is truncated.
    cut = cut or bool(reasons) or any(one.truncated for one in rows)
    if cut:
        rows = [Encoded(one.input_ids, one.labels, True) for one in rows]
    cut_tokens = sum(tokens_cut for _, tokens_cut in results)
    return Outcome(row, rows, cut=CUT_TURNS if cut else None, cut_tokens=cut_tokens)


def _chat(
    row: Row, chat: Chat, tokens: Tokens, max_length: int, rules: EncodeRules
) -> tuple[Encoded | Skipped, int]:
    """One rendered chat, cut behind the last turn that fits, and how many tokens that took away."""
    # Of a very long chat what cannot be kept is not even tokenized, and so not counted.
    limit = max_length + MARGIN if len(chat.text) > PIECE else None
    encoded = tokens.chat(chat.text, chat.literals, limit)
    if encoded is None:
        return Skipped(CONTROL), 0
    ids, places = encoded
    trained = [False] * len(ids)
    ends = []
    for turn in chat.turns:
        first, last = turn.span
        # A token across the border of a turn is one that the model has to write.
        inside = [i for i, (a, b) in enumerate(places) if a < last and b > first]
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
        if _drops(row, length, max_length, rules):
            return Skipped(DROPPED), 0
        length = max((end + shift for end in ends if end + shift <= max_length), default=0)
        if not length:
            begins = trained.index(True) if True in trained else len(ids)
            return Skipped(TOO_LONG if begins >= max_length else TOO_LONG_ANSWER), 0
    fixed = max(1, len(tokens.start))
    labels = [
        token if (rules.train_on_prompt or learn) and place >= fixed else IGNORE
        for place, (token, learn) in enumerate(zip(ids[:length], trained[:length], strict=True))
    ]
    if labels.count(IGNORE) == len(labels):
        return Skipped(ONE_TOKEN), 0
    return Encoded(ids[:length], labels, length < len(ids)), len(ids) - length


def _reachable(messages: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """The messages of which something can be among the first `max_length` tokens of a chat.

    A message takes two tokens at least, and a token stands for `TOKEN_CHARACTERS` at most. What
    comes behind is left out before it is rendered: once for each turn would be long.
    """
    size = 0
    for number, message in enumerate(messages):
        if 2 * number > max_length or size > TOKEN_CHARACTERS * max_length:
            return messages[:number]
        size += len(message.get("content", ""))
    return messages


def _drops(row: Row, length: int, max_length: int, rules: EncodeRules) -> bool:
    """Whether a row that is too long is left out. Errors: `DataError` where none may be."""
    if rules.long_rows == "error":
        raise DataError(
            f"{row.where}: the row has {length} tokens or more, max_length is {max_length}",
            f"{LONGER}, or give --long_rows truncate or drop",
        )
    return rules.long_rows == "drop"

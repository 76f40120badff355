"""The ids and labels of one row: which of its tokens are trained on, and what truncation takes.

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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qlora_kit.data.chat_mask import LEFT_OUT, NO_TURN, Chat, chat_tokens, chats
from qlora_kit.data.outcome import EncodeRules, Outcome
from qlora_kit.data.rows import Row, is_document
from qlora_kit.data.tokens import IGNORE, PIECE, Encoded, Ids, Skipped, Tokens
from qlora_kit.data.turns import unread
from qlora_kit.errors import DataError

TOO_LONG = "prompt longer than max_length"
TOO_LONG_ANSWER = "completion longer than max_length"
DROPPED = "longer than max_length"
ONE_TOKEN = "a single token"
CONTROL = "a control token that cannot be taken apart"
"""Why a row is skipped, beside the reasons of `chat_mask.py`."""

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
CUT_TEXT = "the text is cut into several rows"
"""What truncation takes from a row."""

TOKEN_CHARACTERS = 256
"""Characters of the longest token, twice over: vocabularies have runs of 128 blanks."""

MARGIN = 16
"""Tokens beyond `max_length` that a chat is tokenized to: several starts become one."""


def encode_text(row: Row, ids: Ids, tokens: Tokens, max_length: int, rules: EncodeRules) -> Outcome:
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


def encode_completion(
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


def encode_chat(row: Row, tokens: Tokens, max_length: int, rules: EncodeRules) -> Outcome:
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
    encoded = chat_tokens(tokens, chat.text, chat.literals, limit)
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

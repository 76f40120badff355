"""Pairs of answers as tokens: two rows side by side, of which neither is lost alone.

Each answer becomes a row of its own, in which the answer alone is trained on: an even place has the
chosen one, the odd place behind it the rejected one. Where one is skipped the pair is, and a prompt
that is too long for one loses as much of its beginning in the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_kit.data.labels import LONGER
from qlora_kit.data.outcome import Outcome
from qlora_kit.data.pairs import SIDES, is_pair
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Encoded

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

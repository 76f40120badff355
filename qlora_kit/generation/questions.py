"""What `evaluate` asks of each row, what it expects, and whether the answer is that.

A row of prompt and completion asks for the completion. A row of messages asks for its last trained
turn, with the tokens that training puts before it: the chat template decides where that begins. An
answer is right where it equals what is expected, blanks around both left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from qlora_kit.config.generation import EvaluateConfig
from qlora_kit.data.encode import encode, prompt_ids
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import IGNORE, Encoded, Skipped
from qlora_kit.generation.decode import answers
from qlora_kit.generation.text import added_text

WHOLE = 2**31
"""Tokens of a row that is not cut."""


@dataclass(frozen=True)
class Question:
    """The ids to go on from, and two texts: how the prompt is shown, and the expected answer."""

    ids: list[int]
    prompt: str
    expected: str


def exact_matches(
    model: PreTrainedModel,
    tokenizer: Any,
    ends: Collection[int],
    rows: Iterable[Row],
    rules: EncodeRules,
    options: EvaluateConfig,
    context: int,
) -> list[dict[str, Any]]:
    """What each row asks, what it expects, the greedy answer, and whether that is right.

    `ends` are the tokens that end an answer, which is none where the prompt fills the model's
    `context`. Errors: those of encoding.
    """
    asked = _questions(rows, tokenizer, rules, ends)
    texts = _answers(model, tokenizer, asked, options, context, ends)
    return [
        {
            "prompt": question.prompt,
            "expected": question.expected,
            "answer": text,
            "right": text == question.expected,
        }
        for question, text in zip(asked, texts, strict=True)
    ]


def _questions(
    rows: Iterable[Row], tokenizer: Any, rules: EncodeRules, ends: Collection[int]
) -> list[Question]:
    """The questions of rows; a chat without a turn to train on asks nothing.

    `ends` are the tokens that end an answer. Errors: those of encoding.
    """
    rules = replace(rules, train_on_prompt=False, long_rows="truncate")
    found = []
    for row in rows:
        if "completion" in row.content:
            prompt, answer = row.content["prompt"], row.content["completion"]
            ids = prompt_ids(prompt, tokenizer, literal=row.literal)
            found.append(Question(ids, prompt, answer.strip()))
        elif "messages" in row.content:
            encoded = encode(row, tokenizer, WHOLE, rules)
            # Of a chat that was taken apart, the last one has all of it.
            if not isinstance(encoded, Skipped):
                found.append(_last_turn(encoded[-1], tokenizer, ends))
    return found


def _last_turn(chat: Encoded, tokenizer: Any, ends: Collection[int]) -> Question:
    """The last run of trained tokens, and what is before it."""
    last = max(place for place, label in enumerate(chat.labels) if label != IGNORE)
    first = last
    while first and chat.labels[first - 1] != IGNORE:
        first -= 1
    turn, before = chat.input_ids[first : last + 1], chat.input_ids[:first]
    kept = next((place for place, token in enumerate(turn) if token in ends), len(turn))
    expected = added_text(tokenizer, turn[:kept], before).strip()
    return Question(before, tokenizer.decode(before, skip_special_tokens=True), expected)


def _answers(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Sequence[Question],
    options: EvaluateConfig,
    context: int,
    ends: Collection[int],
) -> list[str]:
    """The greedy answer to each question; none where the prompt fills the model's context."""
    room = [min(options.max_new_tokens, context - len(question.ids)) for question in asked]
    # Prompts of like length follow each other, and so share a batch.
    order = sorted(
        (index for index, limit in enumerate(room) if limit > 0),
        key=lambda index: len(asked[index].ids),
    )
    found = answers(
        model,
        tokenizer,
        [asked[index].ids for index in order],
        max_new_tokens=[room[index] for index in order],
        eos_ids=ends,
        batch_size=options.batch_size,
    )
    texts = [""] * len(asked)
    for index, text in zip(order, found, strict=True):
        texts[index] = text.strip()
    return texts

"""Answers to many prompts: token by token beside each other, or as texts.

Both run on the engine of `engine.py`, whose step gives every request one token more. An answer
depends on its prompt, its adapter and its seed, not on the rows beside it. It ends at an end token,
at a stop string, or after so many tokens; what stop strings see is the text that the answer adds to
its prompt's.

The loop is our own, and not transformers' `generate`, because it is an iterator: a caller takes
tokens as they come, and stops by taking no more. `generate` hands tokens to a callback, which makes
an iterator only with a second thread. On the CPU both gave the same tokens, one prompt and eight of
different lengths, at the same speed within 7 %.

Left out: beams, speculative decoding, models without attention.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.base.decoder import in_mode
from qlora_kit.data.answers import turn_ends
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.generation.batches import RowAdapters
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import (
    Request,
    Ticket,
    check_request,
    check_token,
    not_finite,
)
from qlora_kit.generation.sampling import Sampling
from qlora_kit.generation.text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.lora.bank import AdapterBank


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    ended: Callable[[int], bool] | None = None,
    bank: AdapterBank | None = None,
    adapters: Sequence[str | None] | None = None,
    **sampling: Any,
) -> Iterator[list[int | None]]:
    """At each step the token that each row has drawn, None for rows that have ended.

    A row ends when it draws one of `eos_ids`, which is not part of the answer, or after
    `max_new_tokens`, or where `ended`, asked of each row after each step, says so. `sampling` names
    fields of `Sampling`; without any, the likeliest token is taken. With a `bank`, `adapters` names
    one for each prompt, or None for the base alone. The model is in evaluation mode while the
    iterator is open, and back in its own mode (module by module) once it is used up or closed; no
    state of the model and no global random state changes.

    Raises `ConfigError`, before anything is computed, for a number out of its range, an empty
    prompt, a token that the model does not have, or a prompt that together with `max_new_tokens`
    exceeds the model's context; `AdapterError` for an unknown adapter; `NumericError` where logits
    are not finite.
    """
    requests = _requests(prompts, max_new_tokens, eos_ids, adapters, sampling)
    _check_requests(model, requests, pad_id, bank)
    # All prompts are computed in the first step: rows are told of side by side.
    engine = Engine(model, pad_id=pad_id, bank=bank, most_tokens=math.inf)
    return _steps(model, engine, [engine.add(request) for request in requests], ended)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stops: Sequence[str] = (),
    eos_ids: Collection[int] | None = None,
    batch_size: int = 8,
    bank: AdapterBank | None = None,
    adapters: Sequence[str | None] | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The answer to each prompt in turn, without special tokens; `batch_size` are made together.

    Where one ends, the next prompt takes its place. It ends before the first of `stops`. `eos_ids`
    is `end_ids` where it is not given, and `max_new_tokens` may be a number for each prompt; the
    rest and errors are as in `generate_ids`, before anything is computed.
    """
    ends = end_ids(model, tokenizer) if eos_ids is None else eos_ids
    requests = _requests(prompts, max_new_tokens, ends, adapters, sampling)
    answered = answer_requests(
        model, tokenizer, requests, stops=stops, batch_size=batch_size, bank=bank
    )
    return (text for text, _ in answered)


def answer_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    stops: Sequence[str] = (),
    batch_size: int = 8,
    bank: AdapterBank | None = None,
) -> Iterator[tuple[str, Ticket]]:
    """The answer to each request in turn, as in `answers`, and the ticket with its tokens."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}", "give at least 1")
    # What stands in the padding is masked: any token that the model has will do.
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    _check_requests(model, requests, pad_id, bank)
    engine = Engine(model, pad_id=pad_id, bank=bank)
    return _texts(engine, tokenizer, requests, stops, batch_size)


def end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation_config: Any = None
) -> frozenset[int]:
    """Every token that ends an answer: what ends a turn of the tokenizer's chat template, and the
    EOS of the tokenizer, the config and the generation config (the model's, if none is given).

    A chat model's end of turn often stands in the last one only, a base's in the template only.
    """
    ends = set(turn_ends(tokenizer))
    settings = generation_config or getattr(model, "generation_config", None)
    for owner in (tokenizer, model.config, settings):
        named = getattr(owner, "eos_token_id", None)
        if named is not None:
            ends.update([named] if isinstance(named, int) else named)
    return frozenset(ends)


def _requests(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    eos_ids: Collection[int],
    adapters: Sequence[str | None] | None,
    sampling: dict[str, Any],
) -> list[Request]:
    """One for each prompt."""
    count, drawn = len(prompts), Sampling(**sampling)
    names: Sequence[str | None] = [None] * count if adapters is None else adapters
    most = [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
    for what, given in (("adapters", names), ("max_new_tokens", most)):
        if len(given) != count:
            raise ConfigError(
                f"{what} has {len(given)} values for {count} prompts", "give one for each prompt"
            )
    ends = frozenset(eos_ids)
    return [
        Request(prompt, limit, ends, drawn, name)
        for prompt, limit, name in zip(prompts, most, names, strict=True)
    ]


def _check_requests(
    model: PreTrainedModel, requests: Sequence[Request], pad_id: int, bank: AdapterBank | None
) -> None:
    """Refuse what cannot be answered, before any is taken."""
    check_token(model, pad_id)
    known = RowAdapters(model, bank)
    for row, request in enumerate(requests):
        what = "the prompt" if len(requests) == 1 else f"prompt {row}"
        check_request(model, request, what)
        known.find(request.adapter, what)


def _steps(
    model: PreTrainedModel,
    engine: Engine,
    tickets: list[Ticket],
    ended: Callable[[int], bool] | None,
) -> Iterator[list[int | None]]:
    with in_mode(model.modules(), training=False):
        while not engine.idle:
            told = {ticket: token for ticket, token in engine.step() if token is not None}
            for row, ticket in enumerate(tickets):
                _check(ticket, row)
            if not told:
                return
            yield [told.get(ticket) for ticket in tickets]
            for row, ticket in enumerate(tickets):
                if ended is not None and ticket.end is None and ended(row):
                    engine.drop(ticket)


def _texts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    stops: Sequence[str],
    batch_size: int,
) -> Iterator[tuple[str, Ticket]]:
    """The text of each request and its ticket, in their order."""
    running: dict[Ticket, tuple[int, AnswerText, list[str]]] = {}
    waiting, done, given = deque(enumerate(requests)), dict[int, tuple[str, Ticket]](), 0
    while given < len(requests):
        while waiting and len(running) < batch_size:
            row, request = waiting.popleft()
            text = AnswerText(tokenizer, after=request.ids, stops=stops)
            running[engine.add(request)] = row, text, []
        for ticket, token in engine.step():
            if ticket not in running:
                continue  # it stopped with the token that was its last
            row, text, pieces = running[ticket]
            _check(ticket, row)
            if token is not None:
                pieces.append(text.push(token))
            if token is None or text.stopped:
                engine.drop(ticket)
                done[row] = "".join([*pieces, text.finish()]), ticket
                del running[ticket]
        while given in done:
            yield done.pop(given)
            given += 1


def _check(ticket: Ticket, row: int) -> None:
    """Raise what ended a row. Errors: `NumericError`, or what says that memory ended."""
    if isinstance(ticket.error, NumericError):
        raise not_finite(f"of row {row}", len(ticket.tokens) + 1)
    if ticket.error is not None:
        raise ticket.error

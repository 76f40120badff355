"""Answers of a base and its adapters to the prompts of `generate`, and how fast they come."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_kit.config.generation import GenerateConfig, SamplingConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.generation.decode import answer_requests, generate_ids
from qlora_kit.generation.prompts import Prompt
from qlora_kit.generation.request import Request
from qlora_kit.generation.sampling import Sampling
from qlora_kit.generation.text import AnswerText
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named
from qlora_kit.run.trained_form import bare_note, form_note

Item = TypeVar("Item")


@dataclass
class Speed:
    """Tokens of prompts, tokens that were drawn, and the seconds that both took."""

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, and the time that each takes to come; not what is done with it."""
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.tokens:,} tokens in {self.seconds:.2f} s: {rate:,.1f} new tokens/s, "
            f"with the time of prompts of {self.prompt_tokens:,} tokens"
        )


@dataclass(frozen=True)
class Generation:
    """Answers that come one after another, and how fast they came so far."""

    pieces: Iterator[str] | Iterator[dict[str, Any]]
    speed: Speed


def answered(named: Named, prompts: Sequence[Prompt]) -> Generation:
    """The answer to the prompt in pieces, a line end behind it; or each row with its answer.

    Adapters that are asked otherwise than they were trained are named in a warning.
    Errors: those of the base, the adapters and generation.
    """
    asked = {one.adapter: named.adapters[one.adapter] for one in prompts if one.adapter is not None}
    chat = named.parsed[GenerateConfig].chat
    how = "generate without --chat answers" if chat else "--chat answers"
    note = form_note(asked, how, plain=not chat)
    if note is None and not chat:
        note = bare_note(asked, ((one.text, one.adapter) for one in prompts))
    if note:
        warnings.warn(note, stacklevel=1)
    speed = Speed()
    if named.parsed[GenerateConfig].prompts is None:
        return Generation(_answer_pieces(named, prompts[0], speed), speed)
    return Generation(_answer_rows(named, prompts, speed), speed)


def _answer_pieces(named: Named, prompt: Prompt, speed: Speed) -> Iterator[str]:
    """The answer to one prompt, as it comes, and a line end."""
    options, sampling = named.parsed[GenerateConfig], named.parsed[SamplingConfig]
    opened = AdaptedBase.open(named)
    format = opened.formats[prompt.adapter]
    ids = format.prompt_ids(prompt.text, options.chat)
    steps = generate_ids(
        opened.load(),
        [ids],
        max_new_tokens=sampling.max_new_tokens,
        eos_ids=format.ends,
        pad_id=padding_id(format.tokenizer),
        bank=opened.bank,
        adapters=[prompt.adapter],
        **vars(Sampling.of(sampling)),
    )
    speed.prompt_tokens += len(ids)
    text = AnswerText(format.tokenizer, after=ids, stops=sampling.stops)
    for (token,) in speed.timed(steps):
        speed.tokens += 1
        if token is not None:
            yield text.push(token)
        if text.stopped:
            break
    yield text.finish() + "\n"


def _answer_rows(named: Named, prompts: Sequence[Prompt], speed: Speed) -> Iterator[dict[str, Any]]:
    """The row of each prompt with its `answer`, and who gave it where there are several."""
    options, sampling = named.parsed[GenerateConfig], named.parsed[SamplingConfig]
    opened = AdaptedBase.open(named)
    requests = [
        Request(
            format.prompt_ids(prompt.text, options.chat),
            sampling.max_new_tokens,
            format.ends,
            Sampling.of(sampling),
            prompt.adapter,
        )
        for prompt in prompts
        for format in (opened.formats[prompt.adapter],)
    ]
    answered = answer_requests(
        opened.load(),
        opened.base.tokenizer,
        requests,
        stops=sampling.stops,
        batch_size=options.batch_size,
        bank=opened.bank,
    )
    named_in_rows = len(opened.adapters) > 1
    for prompt, (text, ticket) in zip(prompts, speed.timed(answered), strict=True):
        speed.prompt_tokens += len(ticket.request.ids)
        speed.tokens += len(ticket.tokens)
        given = named_in_rows or "adapter" in prompt.row
        yield {**prompt.row, **({"adapter": prompt.adapter} if given else {}), "answer": text}

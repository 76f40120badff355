"""Answers of a base, or of an adapter on it, to the prompts of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.config.generation import AdaptersConfig, GenerateConfig, SamplingConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.generation.decode import answers, generate_ids
from qlora_kit.generation.text import stream_text, until
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named

Row = dict[str, Any]
DRAWING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_new_tokens")


def answer_pieces(named: Named, prompt: str, adapter: str | None) -> Iterator[str]:
    """The answer of an adapter to one prompt, as it comes, and a line end."""
    options, sampling = named.parsed[GenerateConfig], named.parsed[SamplingConfig]
    opened = _open(named)
    format = opened.formats[adapter]
    ids = format.prompt_ids(prompt, options.chat)
    model, pad_id = opened.load(), padding_id(format.tokenizer)
    with opened.bank.using(adapter):
        steps = generate_ids(model, [ids], eos_ids=format.ends, pad_id=pad_id, **_drawing(sampling))
        pieces = stream_text(format.tokenizer, (step[0] for step in steps), after=ids)
        yield from until(pieces, sampling.stops)
    yield "\n"


def answer_rows(named: Named, rows: Sequence[Row], adapter: str | None) -> Iterator[Row]:
    """Each row with its `answer`."""
    options, sampling = named.parsed[GenerateConfig], named.parsed[SamplingConfig]
    opened = _open(named)
    format = opened.formats[adapter]
    ids = [format.prompt_ids(row["prompt"], options.chat) for row in rows]
    model = opened.load()
    with opened.bank.using(adapter):
        texts = answers(
            model,
            format.tokenizer,
            ids,
            stops=sampling.stops,
            eos_ids=format.ends,
            batch_size=options.batch_size,
            **_drawing(sampling),
        )
        for row, text in zip(rows, texts, strict=True):
            yield {**row, "answer": text}


def _open(named: Named) -> AdaptedBase:
    return AdaptedBase.open(named, named.parsed[AdaptersConfig].allow_other_base)


def _drawing(sampling: SamplingConfig) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in DRAWING}

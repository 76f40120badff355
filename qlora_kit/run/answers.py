"""Answers of a base, or of an adapter on it, to the prompts of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.config.generation import AdaptersConfig, GenerateConfig, SamplingConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.data.chat_template import NO_OPTIONS
from qlora_kit.data.encode import prompt_ids
from qlora_kit.generation.decode import answers, end_ids, generate_ids
from qlora_kit.generation.text import stream_text, until
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named

Row = dict[str, Any]
DRAWING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_new_tokens")


def answer_pieces(named: Named, row: Row) -> Iterator[str]:
    """The answer to one prompt, as it comes, and a line end."""
    model, tokenizer, ids, drawing = _opened(named, [row])
    ends = end_ids(model, tokenizer)
    steps = generate_ids(model, ids, eos_ids=ends, pad_id=padding_id(tokenizer), **drawing)
    pieces = stream_text(tokenizer, (step[0] for step in steps), after=ids[0])
    yield from until(pieces, named.parsed[SamplingConfig].stops)
    yield "\n"


def answer_rows(named: Named, rows: Sequence[Row]) -> Iterator[Row]:
    """Each row with its `answer`."""
    options = named.parsed[GenerateConfig]
    model, tokenizer, ids, drawing = _opened(named, rows)
    texts = answers(
        model,
        tokenizer,
        ids,
        stops=named.parsed[SamplingConfig].stops,
        batch_size=options.batch_size,
        **drawing,
    )
    for row, text in zip(rows, texts, strict=True):
        yield {**row, "answer": text}


def _opened(named: Named, rows: Sequence[Row]) -> tuple[Any, Any, list[list[int]], dict[str, Any]]:
    """The model, its tokenizer, the tokens of each prompt, and how an answer is drawn."""
    options = named.parsed[GenerateConfig]
    opened = AdaptedBase.open(named, named.parsed[AdaptersConfig].allow_other_base)
    adapter, tokenizer = opened.adapter, opened.base.tokenizer
    chat = NO_OPTIONS if adapter is None or not options.chat else adapter.chat()
    literal = adapter is not None and adapter.reads_literally()
    ids = [
        prompt_ids(row["prompt"], tokenizer, options.chat, literal, options=chat) for row in rows
    ]
    sampling = named.parsed[SamplingConfig]
    drawing = {name: getattr(sampling, name) for name in DRAWING}
    return opened.load(), tokenizer, ids, drawing

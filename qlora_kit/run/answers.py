"""Answers of a base, or of an adapter on it, to the prompts of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.base.load import read_weights
from qlora_kit.config.commands import GenerateConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.data.chat_template import NO_OPTIONS
from qlora_kit.data.encode import prompt_ids
from qlora_kit.generation.decode import answers, end_ids, generate_ids
from qlora_kit.generation.text import stream_text, until
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.saved_adapter import (
    SavedAdapter,
    open_with_adapter,
    reads_literally,
    run_chat,
)

Row = dict[str, Any]
DRAWING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_new_tokens")


def answer_pieces(parsed: Parsed, adapter: SavedAdapter | None, row: Row) -> Iterator[str]:
    """The answer to one prompt, as it comes, and a line end."""
    model, tokenizer, ids, drawing = _opened(parsed, adapter, [row])
    ends = end_ids(model, tokenizer)
    steps = generate_ids(model, ids, eos_ids=ends, pad_id=padding_id(tokenizer), **drawing)
    pieces = stream_text(tokenizer, (step[0] for step in steps), after=ids[0])
    yield from until(pieces, parsed[GenerateConfig].stops)
    yield "\n"


def answer_rows(parsed: Parsed, adapter: SavedAdapter | None, rows: Sequence[Row]) -> Iterator[Row]:
    """Each row with its `answer`."""
    options = parsed[GenerateConfig]
    model, tokenizer, ids, drawing = _opened(parsed, adapter, rows)
    texts = answers(
        model,
        tokenizer,
        ids,
        stops=options.stops,
        batch_size=options.batch_size,
        **drawing,
    )
    for row, text in zip(rows, texts, strict=True):
        yield {**row, "answer": text}


def _opened(
    parsed: Parsed, adapter: SavedAdapter | None, rows: Sequence[Row]
) -> tuple[Any, Any, list[list[int]], dict[str, Any]]:
    """The model, its tokenizer, the tokens of each prompt, and how an answer is drawn."""
    options = parsed[GenerateConfig]
    base = open_with_adapter(parsed, adapter, options.allow_other_base)
    chat = run_chat(adapter) if options.chat else NO_OPTIONS
    literal = reads_literally(adapter)
    ids = [
        prompt_ids(row["prompt"], base.tokenizer, options.chat, literal, options=chat)
        for row in rows
    ]
    model = read_weights(base)
    if adapter is not None:
        load_adapter(base, adapter.files, allow_other_base=options.allow_other_base)
    return model, base.tokenizer, ids, {name: getattr(options, name) for name in DRAWING}

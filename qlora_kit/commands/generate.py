"""`qlora-kit generate`: go on from a prompt with a base, or with an adapter on it, streamed.

One prompt is answered as text, as it comes; those of a file as one JSON object a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import GenerateConfig

SUMMARY = "Generate text with a base, or with an adapter on it."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit generate", SUMMARY, (BaseConfig, GenerateConfig), given)
    options = parsed[GenerateConfig]
    from qlora_kit.commands.prompts import check_prompt, one_prompt, rows_of_prompts
    from qlora_kit.run.saved_adapter import look_at, open_with_adapter, reads_literally, run_chat

    check_prompt(options)
    look_at(parsed, options.adapter)
    if options.prompts is None:
        rows = [{"prompt": one_prompt(options)}]
    else:
        rows = rows_of_prompts(options.prompts)
    from qlora_kit.base.load import read_weights
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.data.batch import padding_id
    from qlora_kit.data.chat_template import NO_OPTIONS
    from qlora_kit.data.encode import prompt_ids
    from qlora_kit.generation.decode import answers, end_ids, generate_ids, stream_text, until
    from qlora_kit.lora.adapter import load_adapter

    base = open_with_adapter(parsed, options.adapter, options.allow_other_base)
    chat = run_chat(options.adapter) if options.chat else NO_OPTIONS
    literal = reads_literally(options.adapter)
    ids = [
        prompt_ids(row["prompt"], base.tokenizer, options.chat, literal, options=chat)
        for row in rows
    ]
    model = read_weights(base)
    if options.adapter is not None:
        load_adapter(base, options.adapter, allow_other_base=options.allow_other_base)
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_new_tokens")
    drawing = {name: getattr(options, name) for name in names}
    ends, terminal = end_ids(model, base.tokenizer), Terminal()
    if options.prompts is None:
        pad_id = padding_id(base.tokenizer)
        steps = generate_ids(model, ids, eos_ids=ends, pad_id=pad_id, **drawing)
        pieces = stream_text(base.tokenizer, (step[0] for step in steps), after=ids[0])
        for piece in until(pieces, options.stops):
            terminal.stream(piece)
        terminal.stream("\n")
        return 0
    texts = answers(
        model,
        base.tokenizer,
        ids,
        stops=options.stops,
        eos_ids=ends,
        batch_size=options.batch_size,
        **drawing,
    )
    for row, text in zip(rows, texts, strict=True):
        terminal.json({**row, "answer": text})
    return 0

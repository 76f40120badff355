"""`qlora-kit generate`: go on from a prompt with a base, or with an adapter on it, streamed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qlora_kit.commands.adapters import look_at, open_with_adapter
from qlora_kit.commands.arguments import parse
from qlora_kit.config import BaseConfig, GenerateConfig
from qlora_kit.errors import ConfigError, reports_errors

SUMMARY = "Generate text with a base, or with an adapter on it."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit generate", SUMMARY, (BaseConfig, GenerateConfig), given)
    options = parsed[GenerateConfig]
    if options.prompt is None:
        raise ConfigError("no prompt is given", "give --prompt TEXT")
    look_at(parsed, options.adapter)
    from qlora_kit.base.load import read_weights
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.data.batch import padding_id
    from qlora_kit.data.prompt import prompt_ids
    from qlora_kit.generation import end_ids, generate_ids, stream_text
    from qlora_kit.lora.adapter import load_adapter

    base = open_with_adapter(parsed, options.adapter, options.allow_other_base)
    ids = prompt_ids(options.prompt, base.tokenizer, options.chat)
    model = read_weights(base)
    if options.adapter is not None:
        load_adapter(model, options.adapter, allow_other_base=options.allow_other_base)
    steps = generate_ids(
        model,
        [ids],
        max_new_tokens=options.max_new_tokens,
        eos_ids=end_ids(model, base.tokenizer),
        pad_id=padding_id(base.tokenizer),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    drawn = (step[0] for step in steps)
    terminal = Terminal()
    for piece in stream_text(base.tokenizer, drawn, after=ids):
        terminal.stream(piece)
    terminal.stream("\n")
    return 0

"""What `generate` answers: one prompt in pieces, or the rows of a file.

Prompts are read, and what paths, JSON and headers show is refused, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.generation import AdaptersConfig, GenerateConfig
from qlora_kit.generation.prompts import check_prompt, one_prompt, prompts_of_file
from qlora_kit.generation.speed import Speed
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named


@dataclass(frozen=True)
class Generation:
    """Answers that come one after another, and how fast they came so far."""

    pieces: Iterator[str] | Iterator[dict[str, Any]]
    speed: Speed


def generate(parsed: Parsed) -> Generation:
    """The answer to the one prompt in pieces, a line end behind it; or each row with its answer.

    Errors: `ConfigError`, `DataError`, those of the base, the adapters and generation.
    """
    options, adapters = parsed[GenerateConfig], parsed[AdaptersConfig]
    check_prompt(options)
    if options.prompts is None or options.use is not None:
        adapters.chosen(options.use)  # a name that no adapter has is refused here
    allowed = adapters.allow_other_base
    named = Named.open(parsed, adapters.named, allow_other_base=allowed)
    if options.prompts is None:
        prompts = [one_prompt(options, adapters)]
    else:
        prompts = prompts_of_file(options, adapters)
    from qlora_kit.run.answers import answer_pieces, answer_rows

    speed = Speed()
    if options.prompts is None:
        return Generation(answer_pieces(named, prompts[0], speed), speed)
    return Generation(answer_rows(named, prompts, speed), speed)

"""What `generate` answers: one prompt in pieces, or the rows of a file.

Prompts are read, and what paths, JSON and headers show is refused, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.config.generation import AdaptersConfig, GenerateConfig
from qlora_kit.generation.prompts import check_prompt, one_prompt, rows_of_prompts
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named


def generate(parsed: Parsed) -> Iterator[str] | Iterator[dict[str, Any]]:
    """The answer to the one prompt in pieces, a line end behind it; or each row with its answer.

    Errors: `ConfigError`, `DataError`, those of the base, the adapter and generation.
    """
    options = parsed[GenerateConfig]
    check_prompt(options)
    adapters = parsed[AdaptersConfig]
    chosen = adapters.chosen(options.use)
    allowed = adapters.allow_other_base
    named = Named.open(parsed, adapters.named, allow_other_base=allowed)
    if options.prompts is None:
        rows = [{"prompt": one_prompt(options)}]
    else:
        rows = rows_of_prompts(options.prompts)
    from qlora_kit.run.answers import answer_pieces, answer_rows

    if options.prompts is None:
        return answer_pieces(named, rows[0]["prompt"], chosen)
    return answer_rows(named, rows, chosen)

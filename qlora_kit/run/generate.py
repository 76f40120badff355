"""What `generate` answers: one prompt in pieces, or the rows of a file.

Prompts are read, and what paths, JSON and headers show is refused, before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.config.generation import AdaptersConfig, GenerateConfig
from qlora_kit.generation.prompts import check_prompt, one_prompt, prompts_of_file
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named

if TYPE_CHECKING:
    from qlora_kit.run.answers import Generation


def generate(parsed: Parsed) -> Generation:
    """The answer to the one prompt in pieces, a line end behind it; or each row with its answer.

    Errors: `ConfigError`, `DataError`, those of the base, the adapters and generation.
    """
    options, adapters = parsed[GenerateConfig], parsed[AdaptersConfig]
    check_prompt(options)
    if options.prompts is None or options.use is not None:
        adapters.chosen(options.use)  # a name that no adapter has is refused here
    named = Named.open(parsed, adapters.named, allow_other_base=adapters.allow_other_base)
    if options.prompts is None:
        prompts = [one_prompt(options, adapters)]
    else:
        prompts = prompts_of_file(options, adapters)
    from qlora_kit.run.answers import answered

    return answered(named, prompts)

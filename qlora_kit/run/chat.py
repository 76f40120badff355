"""What `chat` is asked for, refused early without torch; then the chat itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.config.commands import ChatConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named

if TYPE_CHECKING:
    from qlora_kit.run.chat_lines import Lines


def open_chat(parsed: Parsed) -> Lines:
    """A conversation with the base and the adapters that the options name.

    Errors: `ConfigError`, those of the base and the adapters; before weights are read also for a
    chat template that is missing, or that leaves out what the system says.
    """
    adapters, use = parsed[AdaptersConfig], parsed[ChatConfig].use
    first = next(iter(adapters.named), None)
    chosen = adapters.chosen(first if use is None else use)
    named = Named.open(parsed, adapters.named, allow_other_base=adapters.allow_other_base)
    from qlora_kit.run.chat_lines import begin

    return begin(named, chosen)

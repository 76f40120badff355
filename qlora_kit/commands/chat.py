"""`qlora-kit chat`: talk to a base and its adapters in the terminal, switching between them."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.chat_screen import ChatScreen
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ChatConfig
from qlora_kit.config.generation import AdaptersConfig, SamplingConfig

SUMMARY = "Talk to a base and its adapters, line by line; /help in the chat lists its commands."
GROUPS = (BaseConfig, AdaptersConfig, ChatConfig, SamplingConfig)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = parse("qlora-kit chat", SUMMARY, GROUPS, argv)
    from qlora_kit.run.chat import open_chat

    return ChatScreen(open_chat(parsed)).run()

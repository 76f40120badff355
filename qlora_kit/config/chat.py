"""How a chat in the terminal begins."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from qlora_kit.config.generation import BASE
from qlora_kit.options.checks import a_name
from qlora_kit.options.option import Options, option


@dataclass(frozen=True)
class ChatConfig(Options):
    """Who answers at first, and what every chat begins with."""

    title: typing.ClassVar[str] = "chat"

    use: str | None = option(
        None,
        f"the adapter that answers at first, or {BASE}: none of them",
        check=a_name("the name of an adapter"),
        metavar="NAME",
        shown_default="the first one",
    )
    system: str | None = option(
        None, "what the system says before the first message", metavar="TEXT"
    )
    plain: bool = option(
        False,
        "no chat template: every message is a prompt by itself with a line end behind it, as in "
        "rows of prompts and completions, and nothing is read that was said before",
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.plain and self.system is not None:
            yield "system is given beside plain, which writes messages alone: leave one of them out"

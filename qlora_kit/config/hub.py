"""Where on the Hugging Face hub a result goes, and who sees it there."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass

from qlora_kit.options.checks import FALSE, also
from qlora_kit.options.option import Options, option

NAME_LIMIT = 96
"""Characters of each of the two parts of a repository's name."""


def _a_repository(value: str) -> str | None:
    """A check for what the hub takes as a name, which is asked before it is sent anywhere."""
    parts = value.split("/")
    good = len(parts) == 2 and all(
        re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII)
        and len(part) <= NAME_LIMIT
        and not re.search(r"--|\.\.|\.git$", part)
        for part in parts
    )
    return None if good else "the name of a repository on the hub, OWNER/NAME"


@dataclass(frozen=True)
class HubConfig(Options):
    """Where on the hub a result goes."""

    title: typing.ClassVar[str] = "hub"

    push_to_hub: str | None = option(
        None,
        "repository on the Hugging Face hub that gets the result once it is on disk, in place of "
        "an older one's README.md and weights; the token is HF_TOKEN's or that of `hf auth login`",
        aliases=("hub_model_id",),
        check=_a_repository,
        reads=also(dict.fromkeys(FALSE)),
        metavar="OWNER/NAME",
    )
    hub_private: bool = option(
        True, "only you see a repository that is made for it", aliases=("hub_private_repo",)
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.push_to_hub is None and not self.hub_private:
            yield "hub_private false goes with push_to_hub, which is not given"

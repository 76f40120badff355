"""`qlora-kit generate`: go on from a prompt with a base, or with an adapter on it, streamed.

One prompt is answered as text, as it comes; those of a file as one JSON object a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import GenerateConfig

SUMMARY = "Generate text with a base, or with an adapter on it."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit generate", SUMMARY, (BaseConfig, GenerateConfig), given)
    from qlora_kit.run.generate import generate

    generation, terminal = generate(parsed), Terminal()
    for piece in generation:
        if isinstance(piece, str):
            terminal.stream(piece)
        else:
            terminal.json(piece)
    return 0

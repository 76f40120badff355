"""`qlora-kit generate`: go on from a prompt with a base, or with adapters on it, streamed.

One prompt is answered as text, as it comes; those of a file as one JSON object a line. How fast
that was is said on standard error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.generation import AdaptersConfig, GenerateConfig, SamplingConfig
from qlora_kit.run.generate import generate

SUMMARY = "Generate text with a base, or with one or many adapters on it."
GROUPS = (BaseConfig, AdaptersConfig, GenerateConfig, SamplingConfig)
EMPTY = (
    "the answer is empty: it ends where it begins; a prompt has to be as in the rows of "
    "training, with the line end or the space that stood before the answer (--prompt - reads it "
    "from standard input, --chat puts it into the template)"
)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = parse("qlora-kit generate", SUMMARY, GROUPS, argv)
    generation, terminal = generate(parsed), Terminal()
    answered = parsed[GenerateConfig].prompts is not None
    for piece in generation.pieces:
        if isinstance(piece, str):
            terminal.stream(piece)
            answered |= bool(piece.strip())
        else:
            terminal.json(piece)
    if not answered:
        warnings.warn(EMPTY, stacklevel=1)
    Terminal(stderr=True).print((str(generation.speed), "dim"))
    return 0

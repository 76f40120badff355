"""`qlora-kit serve`: answer requests of the OpenAI API with a base and adapters on it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ServeConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.run.serve import serve

SUMMARY = "Serve a base and adapters on it through the OpenAI API, and a page to chat with them."


@functools.partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str]) -> int:
    """Run the command until a signal ends it; returns the exit code."""
    parsed = parse("qlora-kit serve", SUMMARY, (BaseConfig, AdaptersConfig, ServeConfig), argv)
    serve(parsed, Terminal().print)
    return 0

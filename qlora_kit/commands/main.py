"""`qlora-kit NAME ...`: hand the arguments to the command of that name."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from qlora_kit.commands.failure import reports_errors
from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.options.parsed import version_line

COMMANDS = {
    "finetune": "load a base in 4, 8 or 16 bits, train LoRA adapters, save them",
    "plan": "say what a run will take, before a byte of weights is read",
    "export": "write what was trained in a format for others, verify it",
    "generate": "generate text with one or many adapters on one base",
    "serve": "answer requests of the OpenAI API with a base and its adapters",
    "show_data": "show, in colour, which tokens are trained on",
    "chat": "talk to a base and its adapters in the terminal",
    "runs": "list the runs of a directory, or compare two",
    "evaluate": "loss, perplexity and exact match of a base, its adapters or an export",
    "quantize": "write a base as a checkpoint that transformers loads in 4 or 8 bits",
    "cache": "list or delete the quantized bases that are kept on disk",
}
USAGE = "usage: qlora-kit COMMAND [--help] [--config FILE] [--FLAG VALUE ...] | --version"


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command named first; returns its exit code."""
    name = argv[0].replace("-", "_") if argv else ""
    known = {command.replace("_", "-"): what for command, what in COMMANDS.items()}
    if name in ("__version", "version"):
        print(version_line())
        return 0
    if name in ("__help", "_h", "help"):
        print(USAGE, "", *(f"  {one:<10} {what}" for one, what in known.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        print(USAGE, file=sys.stderr)
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
        what = f"unknown command {excerpt(argv[0])!r}" if argv else "no command is given"
        guess = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(what + guess, f"name one of {', '.join(known)}")
    module = importlib.import_module(f"qlora_kit.commands.{name}")
    code: int = module.main(argv[1:])
    return code

"""Where `generate` takes its prompts from: the command line, standard input, or a file."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

from qlora_kit.config.generation import GenerateConfig
from qlora_kit.data.fields import text
from qlora_kit.data.lines import decoded, lines
from qlora_kit.data.records import records
from qlora_kit.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
LIMIT = 16 * 1024**2
"""Bytes of one prompt from standard input: as many as a row of data may have."""


def check_prompt(options: GenerateConfig) -> None:
    """Refuse a command without any prompt; nothing is read. Errors: `ConfigError`."""
    if options.prompt is None and options.prompts is None and not _is_piped():
        raise ConfigError(
            "no prompt is given", "give --prompt TEXT or --prompts FILE, or pipe a text in"
        )


def one_prompt(options: GenerateConfig) -> str:
    """The text of `--prompt`, or of standard input. Errors: `ConfigError`, `DataError`."""
    if options.prompt not in (None, "-"):
        assert options.prompt is not None
        return options.prompt
    raw = sys.stdin.buffer.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise DataError(
            f"standard input: has more than {LIMIT // 1024**2} MiB", "give a shorter prompt"
        )
    # As in a shell's $(...), where text that is written by line ends in one that is not meant.
    whole = decoded(raw, 0, "standard input").removesuffix("\n").removesuffix("\r")
    if not whole:
        raise ConfigError("standard input holds no prompt", "give --prompt TEXT, or pipe a text in")
    return whole


def rows_of_prompts(name: str) -> list[dict[str, Any]]:
    """The rows of a file, each with a `prompt`. Errors: `DataError` with `file:line`."""
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--prompts {name}: none of {', '.join(SUFFIXES)}", "name a file of one of those"
        )
    if path.suffix.lower() == ".txt":
        whole = (decoded(raw, at, f"{path}:{line}") for line, at, raw in lines(path))
        rows = [{"prompt": one.rstrip("\r\n")} for one in whole if one.strip()]
        if not rows:
            raise DataError(f"{path}:1: the file is empty or blank", "give at least one prompt")
        return rows
    rows = []
    for line, row in records(path):
        where = f"{path}:{line}"
        if "adapter" in row:
            raise DataError(
                f"{where}: names an adapter, and one adapter answers all rows",
                "take the field out, and give --adapter",
            )
        if "prompt" not in row:
            raise DataError(f'{where}: has no "prompt"', "give every row one")
        rows.append({**row, "prompt": text(row["prompt"], f'{where}: "prompt"')})
    return rows


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file; a closed one and /dev/null are neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

"""Where `generate` takes its prompts from: the command line, standard input, or a file."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config.generation import BASE, AdaptersConfig, GenerateConfig
from qlora_kit.data.fields import text
from qlora_kit.data.lines import decoded, lines
from qlora_kit.data.records import records
from qlora_kit.errors import ConfigError, DataError, excerpt

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
LIMIT = 16 * 1024**2
"""Bytes of one prompt from standard input: as many as a row of data may have."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, the adapter that answers it (None: the base), and the row that it comes from."""

    text: str
    adapter: str | None
    row: Mapping[str, Any]


def check_prompt(options: GenerateConfig) -> None:
    """Refuse a command without any prompt; nothing is read. Errors: `ConfigError`."""
    if options.prompt is None and options.prompts is None and not _is_piped():
        raise ConfigError(
            "no prompt is given", "give --prompt TEXT or --prompts FILE, or pipe a text in"
        )


def one_prompt(options: GenerateConfig, adapters: AdaptersConfig) -> Prompt:
    """`--prompt`, or what standard input holds. Errors: `ConfigError`, `DataError`."""
    adapter = adapters.chosen(options.use)
    if options.prompt not in (None, "-"):
        assert options.prompt is not None
        return Prompt(options.prompt, adapter, {})
    raw = sys.stdin.buffer.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise DataError(
            f"standard input: has more than {LIMIT // 1024**2} MiB", "give a shorter prompt"
        )
    # As in a shell's $(...), where text that is written by line ends in one that is not meant.
    whole = decoded(raw, 0, "standard input").removesuffix("\n").removesuffix("\r")
    if not whole:
        raise ConfigError("standard input holds no prompt", "give --prompt TEXT, or pipe a text in")
    return Prompt(whole, adapter, {})


def prompts_of_file(options: GenerateConfig, adapters: AdaptersConfig) -> list[Prompt]:
    """The prompts of `--prompts`, each for the adapter that its row names, or else for `--use`.

    Errors: `DataError` with `file:line`, `ConfigError`.
    """
    path = Path(options.prompts or "")
    found = []
    for where, row in _rows(path):
        if "prompt" not in row:
            raise DataError(f'{where}: has no "prompt"', "give every row one")
        prompt = text(row["prompt"], f'{where}: "prompt"')
        adapter = _adapter(row, where, options, adapters)
        found.append(Prompt(prompt, adapter, {**row, "prompt": prompt}))
    if not found:
        raise DataError(f"{path}:1: the file is empty or blank", "give at least one prompt")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and the fields of each row."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--prompts {path}: none of {', '.join(SUFFIXES)}", "name a file of one of those"
        )
    if path.suffix.lower() != ".txt":
        yield from ((f"{path}:{line}", row) for line, row in records(path))
        return
    for line, at, raw in lines(path):
        whole = decoded(raw, at, f"{path}:{line}")
        if whole.strip():
            yield f"{path}:{line}", {"prompt": whole.rstrip("\r\n")}


def _adapter(
    row: Mapping[str, Any], where: str, options: GenerateConfig, adapters: AdaptersConfig
) -> str | None:
    """The adapter that answers a row. Errors: `DataError`."""
    names = ", ".join(adapters.named)
    if "adapter" not in row:
        if options.use is None and len(adapters.named) > 1:
            raise DataError(
                f"{where}: names no adapter, and several are given",
                f'give every row an "adapter" ({names}, or null for the base), or give --use',
            )
        return adapters.chosen(options.use)
    name = row["adapter"]
    if name is None or name == BASE:
        return None
    if not isinstance(name, str) or name not in adapters.named:
        raise DataError(
            f'{where}: "adapter" is {excerpt(str(name))}, and no adapter has this name',
            f"name one of {names}, or null for the base"
            if names
            else "give it as --adapter NAME=DIR",
        )
    return name


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file; a closed one and /dev/null are neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

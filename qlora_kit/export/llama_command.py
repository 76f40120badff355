"""The GGUF files of an export by their names, and the command line that llama.cpp takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_kit.config.export import LORA_FILE

ANY_BASE = "BASE.gguf"


def llama_command(program: str, files: Sequence[Path]) -> list[str]:
    """The words that run a program of llama.cpp on the GGUF files of an export, as they are named.

    An adapter that is alone goes on a model that the user has.
    """
    model = next((str(one) for one in files if one.name != LORA_FILE), ANY_BASE)
    lora = [str(one) for one in files if one.name == LORA_FILE]
    return [program, "--model", model, *(["--lora", *lora] if lora else [])]

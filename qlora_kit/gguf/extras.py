"""What a GGUF takes: packages, asked about before torch is imported, and a command that runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from qlora_kit.config.export import LORA_FILE
from qlora_kit.errors import ConfigError

INSTALL_GGUF = "pip install 'qlora-kit[gguf]'"
INSTALL_LLAMA_CPP = "pip install 'qlora-kit[llamacpp]'"
QUANTIZES = "cyllama"
"""The llama.cpp that quantizes."""
ANY_BASE = "BASE.gguf"


def check_extras(quantize: str | None) -> None:
    """Refuse a GGUF that cannot be written here, `quantize` is llama.cpp's type of it.

    Errors: `ConfigError`.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the package gguf is not installed", INSTALL_GGUF)
    if quantize is not None and importlib.util.find_spec(QUANTIZES) is None:
        raise ConfigError(
            f"--quantize {quantize}: {QUANTIZES}, the llama.cpp that quantizes, is not installed",
            f"{INSTALL_LLAMA_CPP}, or leave it out and run llama-quantize FILE.gguf "
            f"{quantize}.gguf {quantize} on what is written",
        )


def llama_command(program: str, files: Sequence[Path]) -> list[str]:
    """The words that run a program of llama.cpp on the GGUF files of an export, as they are named.

    An adapter that is alone goes on a model that the user has.
    """
    model = next((str(one) for one in files if one.name != LORA_FILE), ANY_BASE)
    lora = [str(one) for one in files if one.name == LORA_FILE]
    return [program, "--model", model, *(["--lora", *lora] if lora else [])]

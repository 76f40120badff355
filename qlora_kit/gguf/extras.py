"""The packages that a GGUF takes, which are extras; asked about before torch is imported."""

from __future__ import annotations

import importlib.util

from qlora_kit.errors import ConfigError

INSTALL_GGUF = "pip install 'qlora-kit[gguf]'"
INSTALL_LLAMA_CPP = "pip install 'qlora-kit[llamacpp]'"
QUANTIZES = "cyllama"
"""The llama.cpp that quantizes."""


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

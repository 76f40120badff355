"""The files of a base, each opened once: what they say, and of the weights the headers.

Nothing here needs torch, so that what paths, JSON and headers show is refused before it is
imported; what comes later is handed these and opens nothing but the weights, to read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.checks import read_config, read_generation_config
from qlora_kit.base.contents import tokenizer_files
from qlora_kit.base.safetensors_file import fingerprint, read_entries
from qlora_kit.base.source import Source, resolve
from qlora_kit.base.text_decoder import TextDecoder, text_decoder
from qlora_kit.files.opened import OpenFiles


@dataclass(frozen=True)
class BaseFiles:
    """What a base's files say, each of them checked by itself.

    `config` is config.json, and `decoder` what it says of the text model, with all tensors of that
    by name, of which the `fingerprint` has read some bytes. `generation` is generation_config.json,
    None where there is none; `tokenizer` are the tokenizer's files by name.
    """

    source: Source
    config: Mapping[str, Any]
    decoder: TextDecoder
    fingerprint: str
    generation: Mapping[str, Any] | None
    tokenizer: Mapping[str, Path]

    @property
    def config_path(self) -> Path:
        """Where `config` is from, for errors."""
        return self.source.directory / "config.json"


def find_base(model: str, revision: str | None = None) -> BaseFiles:
    """The files of a model by its name, fetched where it is a hub id.

    Errors: as `resolve`; `ModelError`, `TokenizerError`, `UnsafeInputError` for what they hold.
    """
    return read_base(resolve(model, revision, check=read_config))


def read_base(source: Source) -> BaseFiles:
    """Open the files of a base. Errors: as `find_base`."""
    directory = source.directory
    config = read_config(directory)
    with OpenFiles() as files:
        decoder = text_decoder(config, read_entries(directory, files), directory / "config.json")
        found = fingerprint(decoder.entries or {}, files)
    generation = read_generation_config(directory)
    return BaseFiles(source, config, decoder, found, generation, tokenizer_files(directory))

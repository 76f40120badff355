"""What a model directory claims, checked before a byte of weights is read.

`read_config` and `read_generation_config` look at JSON only; `check_architecture` compares the
headers of the weights with the model that the config describes, built on the meta device. Nothing
from a file is believed before: sizes, offsets, shapes, names and paths are all bounded here, so
that loading can trust what it is given.

`find_base` opens each file once. Nothing here needs torch, so that what paths, JSON and headers
show is refused before it is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base.architecture import (
    architecture_of,
    check_family,
    is_causal,
    refuse_code,
)
from qlora_kit.base.contents import find, names_code, refuse_strays, strays, tokenizer_files
from qlora_kit.base.fields import TOKENS
from qlora_kit.base.json_file import read_json
from qlora_kit.base.safetensors_file import SHOWN, TensorEntry, fingerprint, read_entries, some
from qlora_kit.base.source import Source, contained, is_path, resolve
from qlora_kit.base.text_decoder import TextDecoder, text_config, text_decoder
from qlora_kit.errors import ModelError, UnsafeInputError
from qlora_kit.files.atomic import real_path
from qlora_kit.files.opened import OpenFiles

LAYER_COUNTS = ("num_layers_per_stack", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that config.json has for the number of decoder layers."""

if TYPE_CHECKING:
    import torch


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory: a supported family, without code of its own.

    Of a multimodal model it is the whole file, whose text decoder is supported (`text_decoder`).
    `auto_map` alone is accepted: no file that it names is there, and transformers' own class of
    the family is used. Errors: `ModelError`, `UnsafeInputError`.
    """
    if not os.path.lexists(directory / "config.json"):
        refuse_strays(directory)
    return read_config_file(contained(directory, "config.json"))


def find_config(model: str, revision: str | None = None) -> tuple[Source, Path]:
    """Where a model's config.json is: a file like it, a directory or the hub; nothing else is
    fetched, and torch is not needed. Errors: as `resolve` and `read_config`.
    """
    file = Path(model)
    if is_path(model) and file.is_file() and revision is None:
        name = real_path(file).parent.name if file.name == "config.json" else file.stem
        return Source(name, None, file.parent), file
    source = resolve(model, revision, weights=False, check=read_config)
    return source, source.directory / "config.json"


def read_config_file(path: Path) -> dict[str, Any]:
    """As `read_config`, of a file of any name."""
    whole = read_json(path)
    config = text_config(whole, path)
    if "auto_map" in whole and (
        not is_causal(config.get("model_type")) or names_code(whole["auto_map"], path.parent)
    ):
        raise UnsafeInputError(
            f"{path}: auto_map asks to run Python files of the model",
            "remote code is never run: use a family that transformers knows by itself, without "
            "Python files in its directory",
        )
    check_family(config, path)
    return whole


def read_context(directory: Path) -> int | None:
    """The longest sequence that a directory's config.json says, if it is there and says it.

    Nothing else of it is checked. Errors: `ModelError`.
    """
    path = find(directory, "config.json")
    if path is None:
        return None
    said = text_config(read_json(path), path).get("max_position_embeddings")
    if said and (type(said) is not int or said < 1):
        raise ModelError(f"{path}: max_position_embeddings is {str(said)[:60]}", "correct the file")
    return said or None


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """The generation_config.json of a directory, None without one: its tokens are tokens.

    Errors: `ModelError`, `UnsafeInputError` for code that it asks for.
    """
    path = find(directory, "generation_config.json")
    if path is None:
        return None
    said = read_json(path)
    refuse_code(said, path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not TOKENS.accepts(said.get(name)):
            raise ModelError(
                f"{path}: {name} is {repr(said[name])[:60]}, not a token", "correct or remove it"
            )
    return said


def check_layers(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], path: os.PathLike[str]
) -> None:
    """Refuse another number of layers in the files than in config.json (`path`).

    Done before the architecture is built, which takes the longer the more layers are promised.
    """
    record = architecture_of(config["model_type"])
    layer = (re.escape(record.layers) if record.known else r".*?") + r"\.(\d{1,9})\."
    lists: dict[str, set[int]] = {}
    for name in entries:
        if found := re.match(layer, name):
            lists.setdefault(name[: found.start(1)], set()).add(int(found[1]))
    said = next((config[name] for name in LAYER_COUNTS if config.get(name) is not None), None)
    # Of several lists one has as many, or else the longest one is shown.
    counts = {len(numbers) for numbers in lists.values()} or {0}
    if said is not None and said not in counts:
        raise ModelError(
            f"{path}: num_hidden_layers is {said!r}, and the weights hold {max(counts)} layers",
            "fetch the files again, or correct config.json",
        )


def check_architecture(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, torch.Size],
    tied: Mapping[str, str],
    where: os.PathLike[str],
) -> None:
    """Refuse a checkpoint that is not exactly what the architecture asks for.

    `expected`: name to shape; `tied`: names that may be absent, to the name they share. An
    attention table of old checkpoints (`rotary_emb.inv_freq`) is allowed: it is computed.
    Errors: `ModelError` with up to five names.
    """
    problems = []
    missing = [name for name in expected if name not in entries and name not in tied]
    surplus = [name for name in entries if name not in expected and not is_computed(name)]
    if missing:
        problems.append(f"lacks {some(missing)}")
    if surplus:
        problems.append(f"holds {some(surplus)}, which the architecture does not have")
    shapes = [
        f"{name} is {list(entries[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != tuple(shape)
    ]
    if shapes:
        more = f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
        problems.append(", ".join(shapes[:SHOWN]) + more)
    kinds = [
        f"{entry.name} is {entry.dtype}"
        for name, entry in entries.items()
        if name in expected and not entry.dtype.startswith(("F", "BF"))
    ]
    if kinds:
        problems.append(f"{some(kinds)}, expected floating point")
    if problems:
        raise ModelError(
            f"{where}: the weights do not fit config.json: {'; '.join(problems)}",
            "fetch the files again, or correct config.json",
        )


def is_computed(name: str) -> bool:
    """Whether a stored tensor is one that the model computes by itself."""
    return name.endswith("rotary_emb.inv_freq")


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
    def strays(self) -> tuple[str, ...]:
        """What lies beside them and is not read, in sentences."""
        return strays(self.source.directory)

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

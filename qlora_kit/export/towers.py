"""What an export takes over from a multimodal checkpoint: towers byte for byte, and its settings.

The merged decoder goes back under the names that the files have. Nothing of a tower is looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.contents import PROCESSOR_FILES, find
from qlora_kit.base.meta_model import with_rows
from qlora_kit.base.tensors import as_stored
from qlora_kit.errors import ConfigError
from qlora_kit.export.tensors import ExportTensor, named_as_in_files

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32")
"""dtypes of tensors that are what they look like; others belong to a quantized form."""


def check_towers_stay(base: Base) -> None:
    """Refuse `--with_towers` where there are none, or only in a quantized form.

    Errors: `ConfigError`.
    """
    left = {} if base.wrapper is None else base.wrapper.left or {}
    remedy = "leave --with_towers out: the text model alone is written"
    if not left:
        raise ConfigError(f"with_towers is given, and {base.source.name} has none", remedy)
    for name, entry in left.items():
        if entry.dtype not in PLAIN:
            raise ConfigError(
                f"with_towers: {name} is quantized in the files ({entry.dtype}), and the export is "
                "not",
                remedy,
            )


def whole_tensors(base: Base, tensors: Sequence[ExportTensor]) -> list[ExportTensor]:
    """The decoder's tensors by the files' names, and every tower's with the bytes that it has."""
    left = {} if base.wrapper is None else base.wrapper.left or {}
    return named_as_in_files(tensors, base) + [
        ExportTensor(name, torch.Size(entry.shape), partial(as_stored, entry), entry.torch_dtype)
        for name, entry in left.items()
    ]


def model_config(base: Base, with_towers: bool) -> dict[str, Any]:
    """The config.json of an export, its dtype yet to be set: of what is written, unquantized."""
    rows = base.embedding_rows

    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        changed = with_rows(config, rows) if rows is not None else dict(config)
        changed.pop("quantization_config", None)
        return changed

    if base.wrapper is None:
        assert base.files is not None  # its weights were read
        return plain(base.files.config)
    whole = base.wrapper.config
    if not with_towers:
        tied = bool(getattr(base.model.config, "tie_word_embeddings", False))
        own = {"architectures": [type(base.model).__name__], "tie_word_embeddings": tied}
        return plain({**base.wrapper.text, **own})
    if "text_config" not in whole:
        return plain(whole)
    changed = {**whole, "text_config": plain(whole["text_config"])}
    changed.pop("quantization_config", None)
    return changed


def copy_processors(source: Path, directory: Path) -> None:
    """Copy how images and sounds become tokens, as the files say it."""
    for name in PROCESSOR_FILES:
        if path := find(source, name):
            shutil.copyfile(path, directory / name)

"""The files of an adapter, each opened once: PEFT's config, and the header of the weights.

The header also says what the adapter was trained on, where a run of ours saved it. Nothing here
needs torch, so that what paths, JSON and headers show is refused before it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.json_file import is_deep
from qlora_kit.base.safetensors_file import TensorEntry, read_whole_header
from qlora_kit.base.source import contained
from qlora_kit.errors import AdapterError
from qlora_kit.files.atomic import write_file
from qlora_kit.files.opened import OpenFiles
from qlora_kit.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config

HEADER_KEY = "qlora_kit"
TRAINED_ON: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "revision": str,
    "fingerprint": str,
    "parameters": int,
    "bits": int,
    "quant_type": str,
    "double_quant": bool,
    "blocksize": int,
    "source_dtype": str,
    "compute_dtype": str,
    "embedding_rows": int,
    "skip_modules": (str, list),
    "head_bits": int,
    "lora": dict,
    "wrapper": str,
    "adapter_keys": str,
    "row_format": str,
}


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's files say; `trained_on` is empty for one of PEFT's own, which says nothing.

    `entries` are the tensors of `weights`. `sha256` is that of the whole file of weights, where it
    was asked for.
    """

    directory: Path
    config: Mapping[str, Any]
    weights: Path
    entries: Mapping[str, TensorEntry]
    trained_on: Mapping[str, Any]
    sha256: str | None = None

    @property
    def described_in(self) -> Path:
        """Where `config` was read."""
        return self.weights.parent / CONFIG_FILE


def write_adapter(
    directory: str | os.PathLike[str], weights: bytes, config: Mapping[str, Any]
) -> None:
    """Write an adapter's files into `directory`, which is made where it does not exist."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / WEIGHTS_FILE, weights)
    write_file(target / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def read_adapter(directory: str | os.PathLike[str], *, hashed: bool = False) -> AdapterFiles:
    """Open an adapter's files. Errors: `AdapterError`, `UnsafeInputError`."""
    config = read_adapter_config(directory)
    path = contained(Path(directory), WEIGHTS_FILE, AdapterError)
    with OpenFiles() as files:
        entries, metadata = read_whole_header(path, AdapterError, files)
        said = _trained_on(metadata.get(HEADER_KEY, "{}"), path)
        file = files.open(path)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hashed else None
    return AdapterFiles(Path(directory), config, path, entries, said, sha256)


def _trained_on(text: Any, path: Path) -> dict[str, Any]:
    """What the header's JSON says of the base. Errors: `AdapterError`."""
    try:
        said = dict(json.loads(text))
        if is_deep(said):
            raise ValueError("nested too deeply")
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path}: the header's {HEADER_KEY} is no JSON object", "save the adapter again"
        ) from error
    known = {option: said[option] for option in TRAINED_ON if option in said}
    for option, value in known.items():
        if value is not None and not isinstance(value, TRAINED_ON[option]):
            raise AdapterError(
                f"{path}: the header's {HEADER_KEY} says {option} {str(value)[:60]!r}",
                "save the adapter again",
            )
    return known

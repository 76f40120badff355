"""An adapter's GGUF, read back from disk, and run by llama.cpp on its base.

Each update is compared with the trained one, whatever is installed. Where llama.cpp is, and the
base has room in F32, that is written beside the file, in the values that training multiplied by,
and llama.cpp adds the adapter to it: its logits are compared with those of the model as trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.base import Base
from qlora_kit.config.export import LORA_FILE, ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import free_bytes
from qlora_kit.errors import QloraKitError
from qlora_kit.export.gguf import gguf_size, write_gguf
from qlora_kit.export.gguf_lora import check_updates, own_values, pairs
from qlora_kit.export.gguf_readers import BESIDE, GgufReaders
from qlora_kit.export.gguf_tokens import LLAMA_CPP
from qlora_kit.export.llamacpp import NOT_INSTALLED, llama_library
from qlora_kit.export.readers import report_of
from qlora_kit.files.atomic import check_room, without_folders

WHOLE = ExportConfig(format="gguf", export_dtype="fp32")
"""How the base is written for it."""


def needs_base(base: Base, options: ExportConfig) -> bool:
    """Whether the weights of the base are needed: llama.cpp is here, and runs the adapter on it."""
    assert options.output_dir is not None
    return _why_not_run(base, Path(options.output_dir)) is None


def unread_lora(base: Base, options: ExportConfig) -> Mapping[str, str]:
    """Why llama.cpp would not run the file on its base; nothing where it does."""
    assert options.output_dir is not None
    why = _why_not_run(base, Path(options.output_dir))
    return {} if why is None else {LLAMA_CPP: why}


def verify_lora(
    base: Base, options: ExportConfig, directory: Path, rows: Sequence[Encoded]
) -> dict[str, Any]:
    """What is said in export.json of a file that is read back, and run by llama.cpp on its base.

    Errors: as `check_updates`, `NumericError` for a distance above the limit, `ExportError` where
    there is a limit and it is not run.
    """
    largest = check_updates(base, options, directory)
    found: dict[str, Any] = {"updates": len(pairs(base)), "update_error": largest}
    why = _why_not_run(base, directory)
    if why is None and base.model.device.type == "meta":
        why = "there was no room for its base when it was to be loaded"
    if why:
        absent = {LLAMA_CPP: why}
        return found | report_of([], options, absent) | {"readers": {}, "not_read_by": absent}
    return found | run_on_base(base, options, directory, rows)


def run_on_base(
    base: Base, options: ExportConfig, directory: Path, rows: Sequence[Encoded]
) -> dict[str, Any]:
    """How far llama.cpp's logits are, with the file in `directory` on its base, for export.json.

    Errors: `ExportError`, `NumericError` for a distance above the limit.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        write_gguf(base, None, WHOLE, Path(folder))
        (file,) = Path(folder).glob("*.gguf")
        read = GgufReaders(base, file, rows, lora=directory / LORA_FILE).by_llama_cpp()
    if where := own_values(base.info.bits):
        read = replace(read, how=f"on {where}")
    return report_of([read], options, {})


def _why_not_run(base: Base, directory: Path) -> str | None:
    """Why llama.cpp cannot run the adapter on its base here; None where it can."""
    if llama_library(adapter=True) is None:
        return NOT_INSTALLED
    try:
        size = gguf_size(base, WHOLE)
        check_room(directory, size, "the base in F32")
    except QloraKitError as error:
        return without_folders(error.problem, directory, base.source.directory)
    needed, free = BESIDE * size / 2**30, free_bytes(torch.device("cpu")) / 2**30
    if free < needed:
        return f"its base in F32 takes {needed:.1f} GiB of memory, and {free:.1f} are free"
    return None

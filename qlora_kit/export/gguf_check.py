"""A GGUF as read back from disk: by whoever is there, else tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError
from qlora_kit.export.gguf import gguf_file
from qlora_kit.export.gguf_lora import FILE, beside_model, check_updates
from qlora_kit.export.gguf_readers import GgufReaders
from qlora_kit.export.readers import report_of
from qlora_kit.gguf.file import FileTensor
from qlora_kit.gguf.layout import import_gguf
from qlora_kit.gguf.tensor_types import encode
from qlora_kit.lora.inject import ADAPTER


def verify_gguf(
    base: Base, options: ExportConfig, directory: Path, rows: Sequence[Encoded]
) -> dict[str, Any]:
    """Read the GGUF in a directory back; what is said of it in export.json.

    Where neither llama.cpp nor transformers reads it, there are no distances but that each tensor
    is what was to be written. Errors: `ExportError`, `NumericError` for a distance above the limit.
    """
    lora = directory / FILE if options.has_lora_beside else None
    (file,) = (one for one in directory.glob("*.gguf") if one != lora)
    readers = GgufReaders(base, file, rows, lora)
    reads, absent = readers.all()
    report = report_of(reads, options) | {"not_read_by": absent}
    if not reads:
        readers.tokens.check_file(file)
        tensors = check_tensors(base, options, file)
        report["readers"] = {"gguf": {"tensors": tensors, "read": "tensor by tensor"}}
    if lora is not None:
        report["update_error"] = check_updates(base, beside_model(options), directory)
    return report


def check_tensors(base: Base, options: ExportConfig, file: Path) -> int:
    """Compare each tensor of a file with what was to be written; their number.

    The package gguf reads it. Errors: `ExportError`.
    """
    wanted = {one.name: one for one in gguf_file(base, ADAPTER, options).tensors}
    found = {one.name: one for one in import_gguf().GGUFReader(file).tensors}
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [
        name
        for name in (wanted.keys() & found.keys() if not wrong else ())
        if found[name].data.tobytes() != _content(wanted[name])
    ]
    if wrong:
        raise ExportError(
            f"{file.name}: {wrong[0]} is not what was written, and {len(wrong) - 1} others",
            "nothing was written; export it again, and look at the disk if it stays",
        )
    return len(found)


def _content(tensor: FileTensor) -> bytes:
    pieces = encode(tensor.make(), tensor.kind, tensor.name)
    return b"".join(piece.tobytes() for piece in pieces)

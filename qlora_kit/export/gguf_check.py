"""A GGUF as read back from disk: by whoever is there, else tensor by tensor.

llama.cpp judges all of a file. transformers leaves most of what it says of a model and of its
tokens, so that without llama.cpp all of that is compared with what was to be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.export import LORA_FILE, ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.gguf import gguf_size
from qlora_kit.export.gguf_lora import beside_model, check_updates
from qlora_kit.export.gguf_readers import GgufReaders, absent_readers
from qlora_kit.export.gguf_tokens import LLAMA_CPP
from qlora_kit.export.gguf_written import check_fields, check_tensors
from qlora_kit.export.readers import report_of
from qlora_kit.export.transformers_reader import TRANSFORMERS


def unread_gguf(base: Base, options: ExportConfig) -> Mapping[str, str]:
    """Why nobody here would read the file; nothing where one does. No file is needed."""
    size = gguf_size(base, options) if options.quantize is None else 0
    absent = absent_readers(base, size, adapter=options.has_lora_beside)
    return absent if {LLAMA_CPP, TRANSFORMERS} <= absent.keys() else {}


def verify_gguf(
    base: Base, options: ExportConfig, directory: Path, rows: Sequence[Encoded]
) -> dict[str, Any]:
    """Read the GGUF in a directory back; what is said of it in export.json.

    Where neither llama.cpp nor transformers reads it, there are no distances but that each tensor
    is what was to be written. Errors: `ExportError`, `NumericError` for a distance above the limit.
    """
    lora = directory / LORA_FILE if options.has_lora_beside else None
    (file,) = (one for one in directory.glob("*.gguf") if one != lora)
    readers = GgufReaders(base, file, rows, lora)
    absent = readers.absent()
    if LLAMA_CPP in absent:
        check_fields(base, options, file)
        readers.tokens.check_file(file)
    reads = readers.all(absent)
    report = report_of(reads, options, absent) | {"not_read_by": absent}
    if not reads:
        report["readers"] = {}
        if options.quantize is None:  # what llama.cpp quantized we did not write
            tensors = check_tensors(base, options, file)
            report["readers"] = {"gguf": {"tensors": tensors, "read": "tensor by tensor"}}
    if lora is not None:
        report["update_error"] = check_updates(base, beside_model(options), directory)
    return report

"""A GGUF of a model, quantized by llama.cpp where that is asked for, or with its adapter beside it.

What llama.cpp quantizes is written in the dtype of the export first, beside, and gone afterwards.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.export.gguf import gguf_size, write_gguf
from qlora_kit.export.gguf_lora import beside_model, lora_size, write_lora
from qlora_kit.export.llamacpp import quantize_gguf
from qlora_kit.gguf.extras import check_extras
from qlora_kit.gguf.layout import import_gguf

PLAIN = "plain.gguf"


def any_gguf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export, at most; with `quantize` there are two files for a while.

    Errors: as `gguf_file`, `ConfigError` where no library quantizes.
    """
    size = gguf_size(base, options)
    if options.has_lora_beside:
        size += lora_size(base, beside_model(options))
    if options.quantize is None:
        return size
    check_extras(options.quantize)
    return 2 * size


def write_any_gguf(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the GGUF, quantized where that is asked for. Errors: as `write_gguf`, `ExportError`."""
    write_gguf(base, adapter, options, directory)
    (file,) = directory.glob("*.gguf")
    if options.quantize is not None:
        kind = import_gguf().LlamaFileType[f"MOSTLY_{options.quantize}"]
        plain = file.rename(directory / PLAIN)
        quantize_gguf(plain, file, int(kind))
        plain.unlink()
    if options.has_lora_beside and adapter is not None:
        write_lora(base, adapter, beside_model(options), directory, file.name)

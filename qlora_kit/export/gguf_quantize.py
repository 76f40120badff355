"""A GGUF in one of llama.cpp's types of files, which llama.cpp itself quantizes.

It is written in the dtype of the export first, beside, and gone when it has been quantized.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.export.gguf import gguf_size, write_gguf
from qlora_kit.export.llamacpp import check_quantizes, quantize_gguf
from qlora_kit.gguf.layout import import_gguf

PLAIN = "plain.gguf"


def any_gguf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export, at most; with `quantize` there are two files for a while.

    Errors: as `gguf_file`, `ConfigError` where no library quantizes.
    """
    size = gguf_size(base, options)
    if options.quantize is None:
        return size
    check_quantizes(options.quantize)
    return 2 * size


def write_any_gguf(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the GGUF, quantized where that is asked for. Errors: as `write_gguf`, `ExportError`."""
    write_gguf(base, adapter, options, directory)
    if options.quantize is None:
        return
    kind = import_gguf().LlamaFileType[f"MOSTLY_{options.quantize}"]
    (file,) = directory.glob("*.gguf")
    plain = file.rename(directory / PLAIN)
    quantize_gguf(plain, file, int(kind))
    plain.unlink()

"""An adapter beside the base that an export holds.

The base lies in the export's own directory, the adapter in its folder `adapter`, as PEFT's files.
It is said there to belong to the base beside it, under the name that the export has.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.base.open import open_base
from qlora_kit.base.source import is_path
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.export import QUANTIZED, ExportConfig
from qlora_kit.errors import redacted
from qlora_kit.export.adapter_files import FOLDER
from qlora_kit.export.tensors import dtype_of
from qlora_kit.files.atomic import real_path
from qlora_kit.lora.adapter import save_adapter


def write_beside(base: Base, adapter: str, options: ExportConfig, directory: Path) -> None:
    """Write an adapter of `base` into `directory`, where the base is written already."""
    assert options.output_dir is not None
    place = real_path(Path(options.output_dir))
    reference = options.base_name or redacted(str(place))
    name = place.name if is_path(reference) else reference
    bits = QUANTIZED.get(options.format, 16)
    # On the CPU, for it is only asked what it is.
    asked = BaseConfig(str(directory), bits=bits, dtype=dtype_of(base, options), device="cpu")
    info = replace(open_base(asked).info, name=name, revision=None)
    save_adapter(base, directory / FOLDER, adapter, (reference, info))

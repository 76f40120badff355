"""A model with its adapter in it, in a directory that appears whole or not at all.

It is written aside, inspected while nobody sees it, and put in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.errors import AdapterError
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.readers import check_read
from qlora_kit.export.tensors import dtype_of
from qlora_kit.export.unmerged import write_beside
from qlora_kit.files.atomic import EXPORT_REPORT, check_output, check_room, write_file
from qlora_kit.files.publish import publish
from qlora_kit.lora.inject import ADAPTER, lora_layers


def check_export(base: Base, target: Path, options: ExportConfig) -> None:
    """Refuse what needs no weights: what the format does not take, a disk without room for it.

    So is a limit on a distance that nobody here measures.
    Errors: `ConfigError`, `ExportError`, `ResourceError`.
    """
    format = FORMATS[options.format]
    check_room(target, format.size(base, options), "the export")
    if options.max_kl is not None and (absent := format.unread(base, options)):
        check_read(options, absent)


def export_model(
    base: Base,
    output_dir: str | os.PathLike[str],
    *,
    adapter: str | None = ADAPTER,
    format: str = "hf",
    merge_base: str = "auto",
    dtype: str = "auto",
    shard_size: int = ExportConfig.shard_size,
    with_towers: bool = False,
    overwrite: bool = False,
    inspect: Callable[[Path], None] | None = None,
) -> Path:
    """Write `base` with `adapter` in it in one of the command's formats; returns its directory.

    `adapter` None exports the base alone. The rest are the command's options. Of a multimodal
    checkpoint the text model is written; `with_towers` writes the whole, its towers byte for byte.
    `dtype` auto is the compute dtype of the run; `shard_size` is in bytes. The directory appears
    whole or not at all; `inspect` is called with it while it still lies aside, and may raise to
    keep it from appearing.
    Errors: `ConfigError` and `ResourceError` for the place, `AdapterError`, `NumericError`,
    `ExportError`.
    """
    options = ExportConfig(
        output_dir=str(output_dir),
        overwrite=overwrite,
        format=format,
        merge_base=merge_base,
        export_dtype=dtype,
        with_towers=with_towers,
        shard_size=shard_size,
    )
    return write_export(base, options, inspect, adapter=adapter)


def write_export(
    base: Base,
    options: ExportConfig,
    inspect: Callable[[Path], None] | None = None,
    *,
    adapter: str | None = ADAPTER,
    own_templates: bool = False,
) -> Path:
    """What `options` say of `base` with its adapter, as `export_model`.

    With `own_templates` the chat templates are the tokenizer's and not those of the base's files.
    """
    assert options.output_dir is not None
    target = Path(options.output_dir)
    check_output(target, options.overwrite, [base.source.directory])
    if adapter is not None and not any(
        adapter in one.lora_A for one in lora_layers(base.model).values()
    ):
        raise AdapterError(f"the model has no adapter {adapter!r}", "load one, or name another")
    check_export(base, target, options)
    with publish(target) as directory:
        fill(base, options, directory, adapter=adapter, own_templates=own_templates)
        said: dict[str, Any] = {"format": options.format, "merge_base": options.merged_into}
        said |= {"dtype": dtype_of(base, options), "base": base.info.as_dict()}
        write_file(directory / EXPORT_REPORT, json.dumps(said).encode())
        if inspect is not None:
            inspect(directory)
    return target


def fill(
    base: Base,
    options: ExportConfig,
    directory: Path,
    *,
    adapter: str | None = ADAPTER,
    own_templates: bool = False,
) -> None:
    """Write all of an export into an empty directory, an adapter that is not merged as well.

    Errors: `ConfigError`, `NumericError`, `ExportError`, `ResourceError`.
    """
    format = FORMATS[options.format]
    format.write(base, adapter, options, directory)
    format.companions(base, directory, own_templates)
    if options.is_beside and adapter is not None:
        write_beside(base, adapter, options, directory)

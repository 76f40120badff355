"""An adapter merged into its base, verified on rows before it takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.config.export import ExportConfig
from qlora_kit.data.chat_template import read_templates
from qlora_kit.export.companions import write_companions
from qlora_kit.export.export import check_export, write_export
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.tensors import dtype_of
from qlora_kit.files.atomic import EXPORT_REPORT, check_output
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.metrics import versions, write_json
from qlora_kit.run.named_base import Named

RowsFor = Callable[[Any], tuple[Any, str]]
"""Rows to compare on and their source, for a base."""


def merge(
    named: Named,
    read: Sequence[Path],
    rows_for: RowsFor,
) -> dict[str, Any]:
    """Write the merged model; returns its report. `read` are the places that are read.

    It is compared with the model as trained, on the rows that `rows_for` gives for the base with
    their source. A difference above `--max_kl` is a `NumericError`, and nothing is written.
    Errors: as `export_model`.
    """
    options, adapter = named.parsed[ExportConfig], named.adapter
    assert options.output_dir is not None
    assert adapter is not None
    target = Path(options.output_dir)
    opened = AdaptedBase.open(named, options.allow_other_base, as_trained=True)
    base = opened.base
    check_output(target, options.overwrite, [*read, base.source.directory])
    rows, where = rows_for(base)
    check_export(base, target, options)
    opened.load()
    name = {} if options.base_name is None else {"name": options.base_name}
    report: dict[str, Any] = {
        "format": options.format,
        "verified_on": where,
        "merge_base": options.merged_into,
        "adapter": adapter.files.directory.resolve().name,
        "dtype": dtype_of(base, options),
        "base": base.info.as_dict() | name,
        "versions": versions(),
    }

    if options.with_towers:
        report["with_towers"] = True

    def inspect(directory: Path) -> None:
        # The adapter's templates and tokens to stop at, which the base need not have.
        own = bool(read_templates(adapter.files.directory))
        write_companions(base, directory, own)
        report.update(FORMATS[options.format].verify(base, options, directory, rows))
        write_json(directory / EXPORT_REPORT, report)

    write_export(base, options, inspect)
    return report

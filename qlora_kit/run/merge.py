"""An adapter merged into its base, verified on rows before it takes its place.

With `--compare` every other form that it could leave in is measured as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_kit.config.export import ExportConfig
from qlora_kit.data.chat_template import read_templates
from qlora_kit.export.card import write_card
from qlora_kit.export.export import check_export, write_export
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.tensors import dtype_of, name_of
from qlora_kit.files.atomic import EXPORT_REPORT, check_output
from qlora_kit.lora.inject import ADAPTER
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.compare import compare
from qlora_kit.run.metrics import versions, write_json
from qlora_kit.run.named_base import Named

RowsFor = Callable[[Any], tuple[Any, str]]
"""Rows to compare on and their source, for a base."""


def merge(
    named: Named,
    read: Sequence[Path],
    rows_for: RowsFor,
    on_compared: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Write the merged model, or a base without an adapter; returns its report.

    `read` are the places that are read.

    It is compared with the model as trained, on the rows that `rows_for` gives for the base with
    their source. A difference above `--max_kl` is a `NumericError`, and nothing is written.
    With `--compare`, `on_compared` is called with each other form as it is measured; without
    `--output_dir` the report is of those alone.
    Errors: as `export_model`.
    """
    options, adapter = named.parsed[ExportConfig], named.adapter
    target = None if options.output_dir is None else Path(options.output_dir)
    opened = _open(named)
    base = opened.base
    if target is not None:
        check_output(target, options.overwrite, [*read, base.source.directory])
    rows, where = rows_for(base)
    if target is not None:
        check_export(base, target, options)
    format = FORMATS[options.format]
    opened.load_masters(weights=options.compare or format.needs_base(base, options))
    compared = compare(base, target, rows, on_compared) if options.compare else None
    if target is None:
        return {"verified_on": where, "compared": compared}
    name, is_hub_id = name_of(base, options)
    report: dict[str, Any] = {
        "format": options.format,
        "verified_on": where,
        "merge_base": options.merged_into,
        "dtype": dtype_of(base, options),
        "base": base.info.as_dict() | {"name": name},
        "versions": versions(),
    }
    if adapter is not None:
        report["adapter"] = adapter.files.directory.resolve().name
    if options.with_towers:
        report["with_towers"] = True
    if options.quantize is not None:
        report["quantize"] = options.quantize
    if notes := format.notes(base, options):
        report["notes"] = list(notes)
    if compared is not None:
        report["compared"] = compared

    def inspect(directory: Path) -> None:
        report.update(format.verify(base, options, directory, rows))
        write_json(directory / EXPORT_REPORT, report)
        write_card(report, directory, name if is_hub_id else None)

    # The adapter's templates, which the base need not have.
    own = adapter is not None and bool(read_templates(adapter.files.directory))
    merged = None if adapter is None else ADAPTER
    write_export(base, options, inspect, adapter=merged, own_templates=own)
    return report


def _open(named: Named) -> AdaptedBase:
    """The base as it was trained on, and how the run wrote its chats. Errors: as `merge`."""
    opened = AdaptedBase.open(named, as_trained=True)
    if named.adapter is None:
        return opened
    return replace(opened, base=replace(opened.base, chats=named.adapter.chats_alone()))

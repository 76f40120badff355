"""What `export` writes: a merged model, or an adapter alone; and `quantize`, a base alone.

Places, the adapter's files, headers and the first rows are refused before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.export import ExportConfig, QuantizeConfig
from qlora_kit.errors import ConfigError
from qlora_kit.files.atomic import check_output
from qlora_kit.files.publish import mend
from qlora_kit.gguf.extras import check_extras
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named
from qlora_kit.run.sending import (
    NAME_IT,
    check_base_name,
    check_sending,
    is_sent,
    named_as_repository,
    send_export,
)
from qlora_kit.run.served import export_alone, not_portable, served_model
from qlora_kit.run.verification import asked_rows, verification_rows

if TYPE_CHECKING:
    from qlora_kit.base.base import Base


@dataclass(frozen=True)
class Exported:
    """What was written: the place in words (None: nothing), and what is to be noted.

    `send` sends it to the hub where that is asked for, and gives its address there. A merged model
    has the `report` of its export.json, and what would make it `closer`; an adapter the command
    line that serves it, if there is one.
    """

    place: str | None
    send: Callable[[], str | None]
    notes: tuple[str, ...] = ()
    serve: str | None = None
    report: Mapping[str, Any] | None = None
    closer: str = ""


def export(
    parsed: Parsed,
    note: Callable[[str], None],
    on_compared: Callable[[Mapping[str, Any]], None],
) -> Exported:
    """Export what the options name; `note` is called with what a user should know meanwhile.

    So is `on_compared`, with each form that `--compare` measures.
    Errors: `ConfigError`, those of the adapter's, the base's and the data's files, `NumericError`,
    `ExportError`, `ResourceError`; what the hub refuses is refused here already.
    """
    parsed = named_as_repository(parsed)
    options = parsed[ExportConfig]
    alone = QuantizeConfig in parsed.groups  # a base, and no adapter
    _check_given(options, parsed, () if alone else ("adapter",))
    target = None if options.output_dir is None else Path(options.output_dir)
    paths = (options.adapter, options.verify, parsed.config_file)
    read = [Path(path) for path in paths if path is not None]
    named = Named.open(parsed, options.adapter, allow_other_base=options.allow_other_base)
    if named.files is not None:
        read.append(named.files.source.directory)
    if target is not None:
        mend(target)  # what a killed export left: the old one is in its place again
        check_output(target, options.overwrite, read)
    if options.format == "adapter":
        assert named.adapter is not None  # it is given
        its_own = named.adapter.files.config.get("base_model_name_or_path")
        check_base_name(parsed, options.base_name or its_own, NAME_IT)
    if options.format.startswith("gguf"):
        check_extras(options.quantize)
    check_sending(parsed, options.format)
    send = partial(send_export, parsed, target)
    if options.format == "adapter":
        assert named.adapter is not None
        assert target is not None
        name, notes, serve = export_alone(named.adapter, options, target)
        return Exported(f"{target}, for the base {name}", send, notes, serve)
    asked = None if options.verify is None else asked_rows(options.verify, named.adapter)
    from qlora_kit.run.merge import merge

    def rows_for(base: Base) -> tuple[Any, str]:
        if alone and base.form.stored:
            raise ConfigError(
                f"{base.source.name} is quantized in its files already, in "
                f"{base.quantization.bits} bits",
                "give the original 16-bit model, or use it as it is",
            )
        for said in base.notes:
            note(said)
        rows = verification_rows(named.adapter, asked, base, note)
        if not alone and (path := _path_of_base(options, base)):
            note(not_portable(path))
        return rows

    report = merge(named, read, rows_for, on_compared)
    if target is None:
        return Exported(None, send)
    said, serve = served_model(target)
    return Exported(str(target), send, said, serve, report, options.closer)


def _check_given(options: ExportConfig, parsed: Parsed, always: tuple[str, ...]) -> None:
    """Refuse an export of nothing, or to nowhere. Errors: `ConfigError`."""
    needs_place = not options.compare or is_sent(parsed)
    needed = (*always, "output_dir") if needs_place else always
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        remedy = (
            "give both" if "--adapter" in missing else "give one, or --compare, which needs none"
        )
        remedy = remedy if always else "give a new or empty directory"
        raise ConfigError(f"{' and '.join(missing)} not given", remedy)


def _path_of_base(options: ExportConfig, base: Base) -> str | None:
    """The path of this machine by which an export names its base; None for a name.

    An adapter beside its base is told where the export itself lies.
    """
    if options.output_dir is None or options.base_name is not None:
        return None
    if options.is_beside:
        return str(Path(options.output_dir).absolute())
    return None if base.source.is_portable else base.source.reference

"""`qlora-kit export`: merge an adapter into a plain model, and say how far it is from training."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ExportConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.errors import ConfigError, DataError, NumericError, QloraKitError
from qlora_kit.options.parsed import refuse_tokens

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.data.rows import Rows
    from qlora_kit.data.tokens import Encoded

SUMMARY = "Merge an adapter into its base and write a plain model, verified against training."
FAR_KL = 1e-2
"""Nats a token above which an export is said to be another model: merging exactly and rounding to
bf16 gives 1e-3, and merging into the original base of 4 bits 1e-1."""
NOT_PORTABLE = (
    "the base is named by a path of this machine, {}, which others do not have: --base_name "
    "OWNER/NAME names it for them"
)
VERIFY_LENGTH = 512
VERIFY_BATCH = 8


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    # The export's own --dtype comes first: it is the dtype of what is written.
    parsed = parse("qlora-kit export", SUMMARY, (ExportConfig, BaseConfig), given)
    refuse_tokens(parsed)
    options = parsed[ExportConfig]
    missing = [f"--{name}" for name in ("adapter", "output_dir") if not getattr(options, name)]
    if options.adapter is None or options.output_dir is None:
        raise ConfigError(f"{' and '.join(missing)} not given", "give both")
    from qlora_kit.data.rows import load_rows
    from qlora_kit.files.atomic import check_output, check_room
    from qlora_kit.files.publish import mend
    from qlora_kit.run.saved_adapter import look_at, open_with_adapter

    target, adapter_dir = Path(options.output_dir), Path(options.adapter)
    named = (options.adapter, options.verify, parsed.config_file)
    read = [Path(path) for path in named if path is not None]
    source = look_at(parsed, options.adapter)
    if source is not None:
        read.append(source.directory)
    mend(target)  # what a killed export left: the old one is in its place again
    check_output(target, options.overwrite, read)
    if options.format == "adapter":
        return _adapter_alone(options, adapter_dir, target)
    asked = None
    if options.verify is not None:
        asked = load_rows(DataConfig(data=options.verify, eval_fraction=0), 0)
    from qlora_kit.base.load import load_base, read_weights
    from qlora_kit.base.tensors import DTYPES, dtype_name
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.data.batch import eval_batches, padding_id
    from qlora_kit.data.chat_template import read_templates
    from qlora_kit.export.companions import write_companions
    from qlora_kit.export.merge import REPORT, export_model
    from qlora_kit.export.verify import verify
    from qlora_kit.lora.adapter import load_adapter
    from qlora_kit.run.metrics import versions, write_json

    terminal = Terminal()
    base = open_with_adapter(parsed, options.adapter, options.allow_other_base, as_trained=True)
    check_output(target, options.overwrite, [*read, base.source.directory])
    dtype = options.export_dtype
    if dtype == "auto":
        dtype = dtype_name(base.dtype)
    rows, where = _verification_rows(options.adapter, asked, base, terminal)
    if options.base_name is None and not base.source.is_portable:
        terminal.note(NOT_PORTABLE.format(base.source.reference))
    size = sum(one.numel() for one in base.model.parameters()) * DTYPES[dtype].itemsize
    check_room(target, size, "the export")
    model = read_weights(base)
    load_adapter(base, options.adapter, allow_other_base=options.allow_other_base)

    closer = "export with a wider --dtype, or evaluate the export before it is used"
    if options.merge_base != "dequantized":
        closer = "export with --merge_base dequantized, or evaluate the export before it is used"
    report: dict[str, Any] = {
        "verified_on": where,
        "merge_base": options.merge_base,
        "adapter": Path(options.adapter).resolve().name,
        "dtype": dtype,
        "base": base.info.as_dict()
        | ({} if options.base_name is None else {"name": options.base_name}),
        "versions": versions(),
    }

    def inspect(directory: Path) -> None:
        # The adapter's templates and tokens to stop at, which the base need not have.
        own = bool(read_templates(adapter_dir))
        write_companions(model, base.tokenizer, base.source.directory, directory, own)
        exported = load_base(str(directory), bits=16, dtype=dtype, device=str(base.device))
        batches = eval_batches(rows, VERIFY_BATCH, padding_id(base.tokenizer))
        report.update(verify(model, exported.model, batches).as_dict())
        limit = math.inf if options.max_kl is None else options.max_kl
        if not report["kl"] <= limit or not math.isfinite(report["kl"]):
            said = (
                f"above --max_kl {limit:g}" if math.isfinite(report["kl"]) else "which is no number"
            )
            raise NumericError(
                f"the export is {report['kl']:.3g} nats a token from the model as trained, {said}; "
                "nothing was written",
                closer,
            )
        write_json(directory / REPORT, report)

    export_model(
        base,
        target,
        merge_base=options.merge_base,
        dtype=dtype,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        inspect=inspect,
    )
    terminal.line("exported", str(target), width=10)
    far = report["kl"] > FAR_KL
    terminal.line(
        "compared" if far else "verified",
        f"on {report['tokens']} tokens of {where}: KL {report['kl']:.2e}, "
        f"top-1 agreement {report['top1_agreement']:.1%}, "
        f"largest logit difference {report['max_logit_difference']:.3g}",
        width=10,
    )
    if far:
        warnings.warn(
            f"the export is another model than the one that was trained: {report['kl']:.2g} nats a "
            f"token from it, and for {1 - report['top1_agreement']:.0%} of the tokens another one "
            f"is the likeliest; {closer} (--max_kl makes this an error)",
            stacklevel=1,
        )
    return 0


def _adapter_alone(options: ExportConfig, adapter: Path, target: Path) -> int:
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.export.adapter_files import export_adapter, is_portable
    from qlora_kit.export.merge import REPORT

    name = export_adapter(adapter, target, options.base_name, REPORT)
    terminal = Terminal()
    terminal.line("exported", f"{target}, for the base {name}", width=10)
    if not is_portable(name):
        terminal.note(NOT_PORTABLE.format(name))
    return 0


def _verification_rows(
    adapter: str, asked: Rows | None, base: Base, terminal: Terminal
) -> tuple[Sequence[Encoded], str]:
    """The rows to compare on, and where they come from.

    Those that are asked for; else what the run held out, where that is still here; else the
    package's sample.
    """
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.outcome import EncodeRules
    from qlora_kit.data.rows import load_rows
    from qlora_kit.run.saved_adapter import run_data

    tokenizer, length = base.tokenizer, min(base.context, VERIFY_LENGTH)
    if asked is not None:
        return encode_rows(asked.train, tokenizer, length).rows, asked.train_source
    try:
        run = run_data(adapter)
        if run is not None:
            rows, rules = load_rows(*run), EncodeRules.of(run[0])
            return encode_rows(rows.evaluation, tokenizer, length, rules).rows, rows.eval_source
    except Exception as error:  # whatever it is: the data of a run need not be here any more
        why = error.problem if isinstance(error, QloraKitError) else repr(error)
        terminal.note(f"the run's held-out rows cannot be read, so the sample is: {why}")
    rows = load_rows(DataConfig(), 0)
    try:
        return encode_rows(rows.evaluation, tokenizer, length).rows, rows.eval_source
    except DataError as error:
        raise DataError(
            f"the export cannot be verified on the sample: {error.problem}",
            "give --verify FILE with rows for this model",
        ) from error

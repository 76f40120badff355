"""`qlora-kit export`: merge an adapter into a plain model, and say how far it is from training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.adapters import base_of, run_options
from qlora_kit.commands.arguments import parse
from qlora_kit.config import BaseConfig, DataConfig, ExportConfig
from qlora_kit.errors import ConfigError, NumericError, reports_errors

if TYPE_CHECKING:
    from qlora_kit.data.prompt import Encoded

SUMMARY = "Merge an adapter into its base and write a plain model, verified against training."
VERIFY_LENGTH = 512
VERIFY_BATCH = 8


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    # The export's own --dtype comes first: it is the dtype of what is written.
    parsed = parse("qlora-kit export", SUMMARY, (ExportConfig, BaseConfig), given)
    options = parsed[ExportConfig]
    if options.adapter is None or options.output_dir is None:
        raise ConfigError(
            "no adapter or no place for the export", "give --adapter and --output_dir"
        )
    from qlora_kit.base.load import load_base, open_base, read_weights
    from qlora_kit.data.batch import eval_batches, padding_id
    from qlora_kit.export.merge import export_model
    from qlora_kit.export.verify import verify
    from qlora_kit.files import check_output
    from qlora_kit.lora.adapter import load_adapter
    from qlora_kit.training.record import versions, write_json

    base = open_base(base_of(parsed, options.adapter, as_trained=True))
    target = Path(options.output_dir)
    check_output(target, options.overwrite, [base.source.directory, Path(options.adapter)])
    rows, where = _verification_rows(options, base.tokenizer, base.context)
    model = read_weights(base)
    load_adapter(model, options.adapter)

    report: dict[str, Any] = {
        "verified_on": where,
        "merge_base": options.merge_base,
        "adapter": Path(options.adapter).name,
        "base": model.base_info.as_dict(),
        "versions": versions(),
    }

    def inspect(directory: Path) -> None:
        exported, _ = load_base(
            str(directory), bits=16, dtype=options.export_dtype, device=str(base.device)
        )
        batches = eval_batches(rows, VERIFY_BATCH, padding_id(base.tokenizer))
        report.update(verify(model, exported, batches).as_dict())
        report["dtype"] = exported.base_info.compute_dtype
        if options.max_kl is not None and report["kl"] > options.max_kl:
            raise NumericError(
                f"the export is {report['kl']:.3g} nats a token from the model as trained, above "
                f"--max_kl {options.max_kl:g}; nothing was written",
                "use --merge_base dequantized, or a wider --dtype",
            )
        write_json(directory / "export.json", report)

    export_model(
        model,
        target,
        merge_base=options.merge_base,
        dtype=options.export_dtype,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        inspect=inspect,
    )
    print(f"exported   {target}")
    print(
        f"verified   on {report['tokens']} tokens of {where}: KL {report['kl']:.2e}, "
        f"top-1 agreement {report['top1_agreement']:.1%}, "
        f"largest logit difference {report['max_logit_difference']:.3g}"
    )
    return 0


def _verification_rows(
    options: ExportConfig, tokenizer: Any, context: int
) -> tuple[list[Encoded], str]:
    """The rows to compare on, and where they come from.

    A named file; else what the run held out; else the package's sample.
    """
    from qlora_kit.data.prompt import encode_rows
    from qlora_kit.data.read import load_rows

    assert options.adapter is not None
    data, seed, shown = DataConfig(), 0, "the sample"
    if options.verify is not None:
        data, shown = DataConfig(data=options.verify, eval_fraction=0), options.verify
    else:
        run = run_options(options.adapter)
        names = ("data", "eval_data", "eval_fraction", "format")
        own = {name: run[name] for name in names if name in run}
        if own and own.get("eval_fraction") != 0:
            data, seed, shown = DataConfig(**own), int(run.get("seed", seed)), "the held-out rows"
    rows = load_rows(data, seed)
    chosen = rows.evaluation if options.verify is None else rows.train
    return encode_rows(chosen, tokenizer, min(context, VERIFY_LENGTH)).rows, shown

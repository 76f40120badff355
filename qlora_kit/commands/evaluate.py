"""`qlora-kit evaluate`: loss, perplexity and exact match of a base, an adapter or an export.

What is evaluated is the whole of a file, or what a run would hold out: the held-out file of a
directory, `--eval_data`, or the share that a given `--eval_fraction` draws. Without `--data` it is
what the adapter's own run held out, so that the loss is the one in its run.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import EvaluateConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.errors import ConfigError, NumericError, redacted
from qlora_kit.options.parsed import Parsed

if TYPE_CHECKING:
    from qlora_kit.commands.terminal import Terminal

SUMMARY = "Evaluate a base, an adapter or an export on a file: loss, perplexity, exact match."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit evaluate", SUMMARY, (BaseConfig, DataConfig, EvaluateConfig), given)
    report = _evaluate(parsed)
    from qlora_kit.commands.terminal import Terminal

    terminal = Terminal()
    if parsed[EvaluateConfig].json:
        terminal.json(report, indent=2)
    else:
        _show(report, terminal)
    return 0


def _evaluate(parsed: Parsed) -> dict[str, Any]:
    """What `--json` prints."""
    from qlora_kit.data.rows import load_rows
    from qlora_kit.run.saved_adapter import look_at, open_with_adapter

    options = parsed[EvaluateConfig]
    look_at(parsed, options.adapter)
    data, seed = _data(parsed)
    found = load_rows(data, seed)
    rows, source = found.evaluation or found.train, found.eval_source
    if not found.evaluation:
        source = found.train_source
    from qlora_kit.commands.questions import answered, has_answer, questions

    if options.generate and not any(map(has_answer, rows)):
        raise ConfigError(
            f"generate {options.generate}: {source} has rows of {found.format}, which have no "
            "completion to compare an answer with",
            "use rows of prompt and completion, or leave --generate out",
        )
    from qlora_kit.base.load import read_weights
    from qlora_kit.base.tensors import dtype_name
    from qlora_kit.data.batch import eval_batches, padding_id
    from qlora_kit.data.chat_template import chat_options, check_chat_options, use_template
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.outcome import EncodeRules
    from qlora_kit.generation.decode import end_ids
    from qlora_kit.lora.adapter import load_adapter
    from qlora_kit.training.loss import evaluate

    base = open_with_adapter(parsed, options.adapter, options.allow_other_base)
    if "chat_template" in parsed.given[DataConfig] and data.chat_template is not None:
        use_template(base.tokenizer, data.chat_template)
    check_chat_options(base.tokenizer, chat_options(data))
    length = data.length_in(base.context)
    encoded = encode_rows(rows, base.tokenizer, length, EncodeRules.of(data))
    model = read_weights(base)
    if options.adapter is not None:
        load_adapter(base, options.adapter, allow_other_base=options.allow_other_base)
    batches = eval_batches(encoded.rows, options.batch_size, padding_id(base.tokenizer))
    result = evaluate(model, batches)
    if not math.isfinite(result.loss):
        raise NumericError(
            f"the loss on {source} is {result.loss}",
            "check the adapter and the base, or use another --dtype",
        )
    answers = []
    if options.exact_match:
        ends = end_ids(model, base.tokenizer)
        asked = questions(rows, base.tokenizer, EncodeRules.of(data), ends)
        answers = answered(model, base.tokenizer, asked, options, base.context, ends)
    right = sum(answer["right"] for answer in answers)
    return {
        "model": base.source.name,
        "revision": base.source.revision,
        "bits": base.quantization.bits,
        "dtype": dtype_name(base.dtype),
        "adapter": None
        if options.adapter is None
        else redacted(Path(options.adapter).resolve().name),
        "data": redacted(source),
        "rows": len(encoded.rows),
        "skipped": sum(encoded.skipped.values()),
        "tokens": result.tokens,
        "loss": result.loss,
        # Beyond what a float holds there is nothing to say.
        "perplexity": math.exp(result.loss) if result.loss < 700 else None,
        "exact_match": right / len(answers) if answers else None,
        "right": right if answers else None,
        "asked": len(answers) or None,
        "answers": answers[: options.generate],
    }


def _data(parsed: Parsed) -> tuple[DataConfig, int]:
    """What to read, and the seed that draws a share of it."""
    from qlora_kit.data.source import is_one_table
    from qlora_kit.run.saved_adapter import run_data

    options, data = parsed[EvaluateConfig], parsed[DataConfig]
    given = parsed.given[DataConfig]
    if "data" not in given and options.adapter is not None:
        run = run_data(options.adapter)
        if run is not None:
            own = {name: getattr(data, name) for name in given}
            return replace(run[0], **own), run[1]
    whole = not given & {"eval_data", "eval_fraction"}
    is_file = is_one_table(data.data)
    return replace(data, eval_fraction=0) if whole and is_file else data, options.seed


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    def line(label: str, text: str) -> None:
        terminal.line(label, text, width=10)

    for answer in report["answers"]:
        terminal.print((answer["prompt"].strip(), "dim"))
        line("  expected", answer["expected"])
        line("  answer", f"{answer['answer']}  ({'right' if answer['right'] else 'wrong'})")
    line("model", f"{report['model']}, {report['bits']} bits, {report['dtype']}")
    if report["adapter"] is not None:
        line("adapter", report["adapter"])
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    line("data", f"{report['data']}: {report['rows']} rows{skipped}, {report['tokens']:,} tokens")
    perplexity = report["perplexity"]
    shown = "beyond measure" if perplexity is None else f"{perplexity:,.3f}"
    line("loss", f"{report['loss']:.4f} nats a token, perplexity {shown}")
    if report["asked"]:
        line(
            "exact",
            f"{report['right']} of {report['asked']} answers equal the completion "
            f"({report['exact_match']:.1%})",
        )

"""The loss, the perplexity and the exact matches of a model on rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qlora_kit.base.load import read_weights
from qlora_kit.config.commands import EvaluateConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.data.batch import eval_batches, padding_id
from qlora_kit.data.chat_template import chat_options, check_chat_options, use_template
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Table
from qlora_kit.device import dtype_name
from qlora_kit.errors import NumericError, redacted
from qlora_kit.generation.decode import end_ids
from qlora_kit.generation.questions import answered, questions
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.saved_adapter import SavedAdapter, open_with_adapter
from qlora_kit.training.loss import evaluate


def scores(
    parsed: Parsed, adapter: SavedAdapter | None, data: DataConfig, rows: Table, source: str
) -> dict[str, Any]:
    """What `evaluate --json` prints of the rows of `source`, which `data` says how to encode.

    Errors: those of the base, the adapter and encoding; `NumericError` for a loss that is none.
    """
    options, rules = parsed[EvaluateConfig], EncodeRules.of(data)
    base = open_with_adapter(parsed, adapter, options.allow_other_base)
    if "chat_template" in parsed.given[DataConfig] and data.chat_template is not None:
        use_template(base.tokenizer, data.chat_template)
    check_chat_options(base.tokenizer, chat_options(data))
    encoded = encode_rows(rows, base.tokenizer, data.length_in(base.context), rules)
    model = read_weights(base)
    if adapter is not None:
        load_adapter(base, adapter.files, allow_other_base=options.allow_other_base)
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
        asked = questions(rows, base.tokenizer, rules, ends)
        answers = answered(model, base.tokenizer, asked, options, base.context, ends)
    right = sum(answer["right"] for answer in answers)
    return {
        "model": base.source.name,
        "revision": base.source.revision,
        "bits": base.quantization.bits,
        "dtype": dtype_name(base.dtype),
        "adapter": None if adapter is None else redacted(Path(adapter.name).resolve().name),
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

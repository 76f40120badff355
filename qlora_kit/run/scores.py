"""The loss, the perplexity and the exact matches of a model on rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import AdaptersConfig, EvaluateConfig
from qlora_kit.data.batch import eval_batches, padding_id
from qlora_kit.data.chat_template import check_chat_options, use_template
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Table
from qlora_kit.errors import NumericError, redacted
from qlora_kit.generation.questions import exact_matches
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named
from qlora_kit.training.loss import evaluate


def scores(named: Named, data: DataConfig, rows: Table, source: str) -> dict[str, Any]:
    """What `evaluate --json` prints of the rows of `source`, which `data` says how to encode.

    Errors: those of the base, the adapter and encoding; `NumericError` for a loss that is none.
    """
    options, rules = named.parsed[EvaluateConfig], EncodeRules.of(data)
    opened = AdaptedBase.open(named, named.parsed[AdaptersConfig].allow_other_base)
    base, adapter = opened.base, opened.adapter
    if "chat_template" in named.parsed.given[DataConfig] and data.chat_template is not None:
        use_template(base.tokenizer, data.chat_template)
    check_chat_options(base.tokenizer, rules.chat)
    encoded = encode_rows(rows, base.tokenizer, data.length_in(base.context), rules)
    model = opened.load()
    batches = eval_batches(encoded.rows, options.batch_size, padding_id(base.tokenizer))
    result = evaluate(model, batches)
    if not math.isfinite(result.loss):
        raise NumericError(
            f"the loss on {source} is {result.loss}",
            "check the adapter and the base, or use another --dtype",
        )
    answers = []
    if options.exact_match:
        answers = exact_matches(model, base.tokenizer, rows, rules, options, base.context)
    right = sum(answer["right"] for answer in answers)
    return {
        "model": base.source.name,
        "revision": base.source.revision,
        "bits": base.quantization.bits,
        "dtype": base.info.compute_dtype,
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

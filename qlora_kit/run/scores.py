"""The loss, the perplexity and the exact matches of a base and its adapters on rows."""

from __future__ import annotations

import math
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import EvaluateConfig
from qlora_kit.data.batch import eval_batches, padding_id
from qlora_kit.data.chat_template import check_chat_options, use_template
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodedRows, EncodeRules
from qlora_kit.data.rows import Table
from qlora_kit.errors import NumericError, redacted
from qlora_kit.generation.questions import exact_matches
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named
from qlora_kit.training.loss import evaluate


def scores(named: Named, data: DataConfig, rows: Table, source: str) -> list[dict[str, Any]]:
    """What `evaluate --json` prints of the rows of `source`, which `data` says how to encode.

    It is one report of the base or its single adapter; of several adapters one each, after that of
    the base. The base is loaded once, and rows are written in the template of whoever answers, as
    the run that made the adapter wrote its chats.
    Errors: those of the base, the adapters and encoding; `NumericError` for a loss that is none.
    """
    options = named.parsed[EvaluateConfig]
    opened = AdaptedBase.open(named)
    base, model = opened.base, opened.base.model
    names: list[str | None] = [None, *opened.adapters]
    if len(opened.adapters) == 1:
        names = list(opened.adapters)
    encoded = _encoded(named, data, rows, opened, names)
    opened.load()
    reports = []
    for name in names:
        tokenizer, ends = opened.formats[name].tokenizer, opened.formats[name].ends
        rules, mine = encoded[name]
        with opened.bank.using(name):
            batches = eval_batches(mine.rows, options.batch_size, padding_id(tokenizer))
            result = evaluate(model, batches)
            if not math.isfinite(result.loss):
                whose = f" of {name}" if len(names) > 1 else ""
                raise NumericError(
                    f"the loss{whose} on {source} is {result.loss}",
                    "check the adapter and the base, or use another --dtype",
                )
            answers = []
            if options.exact_match:
                answers = exact_matches(model, tokenizer, ends, rows, rules, options, base.context)
        right = sum(answer["right"] for answer in answers)
        reports.append(
            {
                "model": base.source.name,
                "revision": base.source.revision,
                "bits": base.quantization.bits,
                "dtype": base.info.compute_dtype,
                "adapter": None if name is None else redacted(name),
                "data": redacted(source),
                "rows": len(mine.rows),
                "skipped": sum(mine.skipped.values()),
                "truncated": mine.truncated,
                "tokens": result.tokens,
                "loss": result.loss,
                # Beyond what a float holds there is nothing to say.
                "perplexity": math.exp(result.loss) if result.loss < 700 else None,
                "exact_match": right / len(answers) if answers else None,
                "right": right if answers else None,
                "asked": len(answers) or None,
                "answers": answers[: options.generate],
            }
        )
    return reports


def _encoded(
    named: Named, data: DataConfig, rows: Table, opened: AdaptedBase, names: list[str | None]
) -> dict[str | None, tuple[EncodeRules, EncodedRows]]:
    """The rows as each adapter and the base read them, and by which rules that is."""
    found = dict[str | None, tuple[EncodeRules, EncodedRows]]()
    made = dict[tuple[str, EncodeRules], EncodedRows]()
    given = named.parsed.given[DataConfig]
    for name in names:
        tokenizer = opened.formats[name].tokenizer
        rules = opened.formats[name].rules(data, given)
        if "chat_template" in given and data.chat_template is not None:
            use_template(tokenizer, data.chat_template)
        key = str(tokenizer.chat_template), rules
        if key not in made:
            check_chat_options(tokenizer, EncodeRules.of(data).chat)
            length = data.length_in(opened.base.context)
            made[key] = encode_rows(rows, tokenizer, length, rules)
        found[name] = rules, made[key]
    return found

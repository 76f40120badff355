"""What `evaluate` evaluates on, refused or read before torch is imported.

It is the whole of a file, or what a run would hold out: the held-out file of a directory,
`--eval_data`, or the share that a given `--eval_fraction` draws. Without `--data` it is what the
adapter's own run held out, so that the loss is the one in its run.json, but for the rounding of the
adapter where it was trained in fp32 and saved in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import AdaptersConfig, EvaluateConfig
from qlora_kit.data.rows import PREFERENCE, load_rows
from qlora_kit.data.source import is_one_table
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.named_base import Named
from qlora_kit.run.saved_adapter import SavedAdapter, as_trained


def evaluate_model(parsed: Parsed) -> list[dict[str, Any]]:
    """The loss, perplexity and answers of the base or its adapter, or of the base and several.

    Errors: those of the files, `ConfigError`, `NumericError`.
    """
    options = parsed[EvaluateConfig]
    adapters = parsed[AdaptersConfig]
    named = Named.open(parsed, adapters.named, allow_other_base=adapters.allow_other_base)
    data, seed = _data(parsed, list(named.adapters.values()))
    found = load_rows(data, seed)
    if found.format == PREFERENCE:
        raise ConfigError(
            f"{found.train_source} has pairs of answers: how much better one of them is "
            "is measured by the run that learns from them (run.json)",
            "give --data with rows of prompt and completion, or of messages",
        )
    asked = parsed.given[DataConfig] & {"data", "eval_fraction"}
    if named.adapters and not asked and not found.evaluation:
        # Of fewer than 20 rows a run of an earlier version held one out: it is not said otherwise.
        raise ConfigError(
            f"no rows of {found.train_source}, on which adapter {', '.join(named.adapters)} was "
            "trained, are held out",
            "give rows as --data",
        )
    rows, source = found.train, found.train_source
    if found.evaluation:
        rows, source = found.evaluation, found.eval_source
    if options.generate and not any(
        {"completion", "messages"} & row.content.keys() for row in rows
    ):
        raise ConfigError(
            f"generate {options.generate}: {source} has rows of {found.format}, which have no "
            "completion to compare an answer with",
            "use rows of prompt and completion, or leave --generate out",
        )
    from qlora_kit.run.scores import scores

    return scores(named, data, rows, source)


def _data(parsed: Parsed, adapters: Sequence[SavedAdapter]) -> tuple[DataConfig, int]:
    """What to read, and the seed that draws a share of it.

    Errors: `ConfigError` where several adapters were trained on different data, and none is given.
    """
    options, data = parsed[EvaluateConfig], parsed[DataConfig]
    given = parsed.given[DataConfig]
    if "data" not in given and adapters:
        runs = [adapter.data() for adapter in adapters]
        run = runs[0]
        if any(other != run for other in runs[1:]):
            raise ConfigError(
                f"{len(adapters)} adapters are given, and their runs held out different rows",
                "give the rows as --data",
            )
        if run is not None:
            own = {name: getattr(data, name) for name in given}
            return replace(run[0], **own), run[1]
    data = as_trained(data, adapters, given)
    whole = not given & {"eval_data", "eval_fraction"} and is_one_table(data.data)
    return replace(data, eval_fraction=0) if whole else data, options.seed

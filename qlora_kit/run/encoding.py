"""The rows of a run as tokens: those that are trained on, and those that are held out."""

from __future__ import annotations

from qlora_kit.base.base import Base
from qlora_kit.base.recurrence import check_packing
from qlora_kit.config.run import RunConfig
from qlora_kit.data.encode import EncodedRows, encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Rows
from qlora_kit.data.token_cache import cache_directory
from qlora_kit.errors import ConfigError


def encode_run(config: RunConfig, rows: Rows, base: Base) -> tuple[EncodedRows, EncodedRows | None]:
    """The rows that are trained on and held out, as tokens. Errors: `DataError`, `ConfigError`."""
    if config.data.packing:
        check_packing(base.model)
    length, rules = config.data.length_in(base.context), EncodeRules.of(config.data)
    cache = cache_directory(config.data.token_cache)
    encoded = encode_rows(rows.train, base.tokenizer, length, rules, cache)
    if rows.evaluation:
        return encoded, encode_rows(rows.evaluation, base.tokenizer, length, rules, cache)
    if config.output.eval_steps:
        raise ConfigError(
            f"eval_steps {config.output.eval_steps} is given, and nothing is held out",
            "give --eval_data or an --eval_fraction, or leave --eval_steps out",
        )
    return encoded, None

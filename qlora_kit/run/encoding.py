"""The rows of a run as tokens: what its options say of them, those trained on, those held out."""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.base.base import Base
from qlora_kit.base.recurrence import check_packing
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.data.answers import ends_text
from qlora_kit.data.chat_template import (
    chat_options,
    check_chat_options,
    date_of,
    has_templates,
    use_template,
)
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodedRows, EncodeRules
from qlora_kit.data.rows import Rows
from qlora_kit.data.token_cache import cache_directory
from qlora_kit.errors import ConfigError
from qlora_kit.training.checkpoint import Checkpoint


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


def settle_data(
    data: DataConfig, adapter: str | None, base: Base, resume: Checkpoint | None, *, is_chat: bool
) -> DataConfig:
    """The options of a run's data with their values; the tokenizer is given its chat template.

    Templates that lie beside `adapter` are taken where none is named. The day on which chats are
    written is the same on resuming. Errors: those of the template, `ConfigError` for what it does
    not read.
    """
    if adapter and data.chat_template is None and has_templates(adapter):
        data = replace(data, chat_template=adapter)
    data = replace(data, max_length=data.length_in(base.context))
    if data.chat_template is not None:
        use_template(base.tokenizer, data.chat_template)
    check_chat_options(base.tokenizer, chat_options(data))
    if not is_chat:
        return data
    kept = None if resume is None else resume.options.get("chat_date")
    day = date_of(base.tokenizer, data.chat_date or (kept if isinstance(kept, str) else None))
    return replace(data, chat_date=day)


def chats_text(data: DataConfig, base: Base) -> str:
    """At which tokens answers stop, and the day that a dated template writes: one line."""
    return ends_text(base.tokenizer, chat_options(data))

"""The rows of a run, in the shape that its method learns from; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.data.lines import GivenRows
from qlora_kit.data.rows import PREFERENCE, Rows, load_rows
from qlora_kit.data.source import lasting
from qlora_kit.errors import ConfigError


def rows_of_run(
    config: RunConfig, given: Mapping[str, GivenRows] | None = None
) -> tuple[RunConfig, Rows]:
    """The rows, and the options with names of files that last; `given` as for `load_rows`.

    Errors: as `load_rows`, `ConfigError` for rows and options of another method.
    """
    config.training.check_packing(config.data.packing)
    data = _of_pairs(config.data) if config.training.pairs else config.data
    rows = load_rows(data, config.training.seed, given)
    if rows.format == PREFERENCE and not config.training.pairs:
        raise ConfigError(
            f"{rows.train_source} has rows of chosen and rejected, which are pairs of answers",
            "give --method dpo to learn from pairs",
        )
    held_out = None if data.eval_data is None else lasting(data.eval_data)
    return replace(config, data=replace(data, data=lasting(data.data), eval_data=held_out)), rows


def _of_pairs(data: DataConfig) -> DataConfig:
    """The options of pairs. Errors: `ConfigError` for what goes with no pair."""
    if data.format not in ("auto", PREFERENCE):
        raise ConfigError(
            f"format {data.format} with method dpo, which learns from pairs",
            f"leave --format out, or give --format {PREFERENCE}",
        )
    return replace(data, format=PREFERENCE)

"""The rows that an export is compared on with the model as trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.config.data import DataConfig
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Rows, load_rows
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import DataError, QloraKitError
from qlora_kit.run.saved_adapter import SavedAdapter, as_trained

if TYPE_CHECKING:
    from qlora_kit.base.base import Base

VERIFY_LENGTH = 512


def asked_rows(name: str, adapter: SavedAdapter | None) -> Rows:
    """The rows that `--verify` names, as the adapter's run read its own. Errors: as `load_rows`."""
    data = DataConfig(data=name, eval_fraction=0)
    return load_rows(as_trained(data, [] if adapter is None else [adapter], ()), 0)


def verification_rows(
    adapter: SavedAdapter | None, asked: Rows | None, base: Base, note: Callable[[str], None]
) -> tuple[Sequence[Encoded], str]:
    """The rows to compare on, and where they come from.

    Those that are asked for; else what the run held out, where that is still here; else the
    package's sample.
    """
    tokenizer, length = base.tokenizer, min(base.context, VERIFY_LENGTH)
    if asked is not None:
        return encode_rows(asked.train, tokenizer, length).rows, asked.train_source
    try:
        run = None if adapter is None else adapter.data()
        if run is not None:
            rows, rules = load_rows(*run), EncodeRules.of(run[0])
            if rows.evaluation:
                found = encode_rows(rows.evaluation, tokenizer, length, rules)
                return found.rows, rows.eval_source
    except Exception as error:  # whatever it is: the data of a run need not be here any more
        why = error.problem if isinstance(error, QloraKitError) else repr(error)
        note(f"the run's held-out rows cannot be read, so the sample is: {why}")
    rows = load_rows(DataConfig(), 0)
    try:
        return encode_rows(rows.evaluation, tokenizer, length).rows, rows.eval_source
    except DataError as error:
        raise DataError(
            f"the export cannot be verified on the sample: {error.problem}",
            "give --verify FILE with rows for this model",
        ) from error

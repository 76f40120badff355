"""Which adapters were trained on prompts and completions, and answer as trained in plain text."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.config.data import DataConfig
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import DataError
from qlora_kit.run.saved_adapter import SavedAdapter


def is_plain(adapter: SavedAdapter) -> bool:
    """Whether its run says so: in the header of its weights, the shape of the rows that it read.

    Older runs say the shape that they were told, or the package's sample: rows of other data may
    be gone, and are not looked at.
    Errors: `AdapterError` for what no run writes.
    """
    own, found = adapter.options(DataConfig), adapter.files.trained_on.get("row_format")
    if found is not None:
        return bool(found == "prompt")
    data = str(own.get("data", ""))
    if own.get("format", "auto") != "auto":
        return bool(own["format"] == "prompt")
    if data.partition(":")[0] != "sample":
        return False
    try:
        return load_rows(DataConfig(data=data, eval_fraction=0.0), seed=0).format == "prompt"
    except DataError:  # a sample that this version has not
        return False


def plain_note(adapters: Mapping[str, SavedAdapter], how: str) -> str | None:
    """What to say of those among some adapters by name, where there are any; `how` to ask them."""
    names = [name for name, adapter in adapters.items() if is_plain(adapter)]
    if not names:
        return None
    were = "were" if len(names) > 1 else "was"
    return f"{', '.join(names)} {were} trained on prompts and completions: {how} as trained"

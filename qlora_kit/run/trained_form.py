"""What rows adapters were trained on, and how they are asked to answer as trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qlora_kit.config.data import DataConfig
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import DataError
from qlora_kit.run.saved_adapter import SavedAdapter

CHATS = "messages"
FORMS = {
    CHATS: "chats",
    "prompt": "prompts and completions",
    "instruction": "Alpaca's instructions",
    "text": "plain text",
}
"""The shapes of rows as `Rows.form` has them, in words."""
MARK = "### Instruction:"
"""A prompt in Alpaca's form has this line."""


def form_of(adapter: SavedAdapter) -> str | None:
    """One of `FORMS`, as the header of its weights has it: the shape of the rows that were read.

    Older runs say the shape that they were told, or the package's sample: rows of other data may
    be gone, and are not looked at. None where it is not known.
    Errors: `AdapterError` for what no run writes.
    """
    own, found = adapter.options(DataConfig), adapter.files.trained_on.get("row_format")
    if found is not None:
        return str(found) if found in FORMS else None
    data, shape = str(own.get("data", "")), str(own.get("format", "auto"))
    if shape == "instruction" and own.get("instruction_as_chat"):
        return CHATS
    if shape != "auto":
        return shape if shape in FORMS else None
    if data.partition(":")[0] != "sample":
        return None
    try:
        return load_rows(DataConfig(data=data, eval_fraction=0.0), seed=0).form
    except DataError:  # a sample that this version has not
        return None


def is_plain(adapter: SavedAdapter) -> bool:
    """Whether it is known to have been trained on text that no chat template wrote."""
    return form_of(adapter) not in (CHATS, None)


def bare_note(
    adapters: Mapping[str, SavedAdapter], asked: Iterable[tuple[str, str | None]]
) -> str | None:
    """What to say of adapters that were trained in Alpaca's form, and are asked otherwise.

    Each of `asked` is a whole prompt and the name of who answers it.
    """
    bare = {name for prompt, name in asked if MARK not in prompt}
    names = [name for name in adapters if name in bare]
    names = [name for name in names if form_of(adapters[name]) == "instruction"]
    if not names:
        return None
    return (
        f"{', '.join(names)} {'were' if len(names) > 1 else 'was'} trained on "
        f'{FORMS["instruction"]}: a prompt in their form, from "{MARK}" to "### Response:" and a '
        "line end, answers as trained"
    )


def form_note(adapters: Mapping[str, SavedAdapter], how: str, *, plain: bool) -> str | None:
    """What to say of those that are not asked as trained, where there are any.

    They are asked in plain text, or in chats; `how` to ask them otherwise.
    """
    named: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        form = form_of(adapter)
        if form is not None and (form == CHATS) == plain:
            named.setdefault(form, []).append(name)
    if not named:
        return None
    parts = (
        f"{', '.join(names)} {'were' if len(names) > 1 else 'was'} trained on {FORMS[form]}"
        for form, names in named.items()
    )
    return f"{', and '.join(parts)}: {how} as trained"

"""The chat template of a tokenizer: its own, one of ours by name, or a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora_kit.data.sandbox import SIZE_LIMIT, check_template
from qlora_kit.errors import ConfigError, DataError, TokenizerError, UnsafeInputError

DIRECTORY = Path(__file__).parent / "templates"
SAVED = "chat_template.jinja"
"""The file in which transformers looks for a tokenizer's template first."""


def template_names() -> list[str]:
    """The names of the project's own templates."""
    return sorted(path.stem for path in DIRECTORY.glob("*.jinja"))


def use_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer the template of that name or file; it is then saved with the tokenizer.

    Errors: `ConfigError` for an unknown name, `DataError` for a file, `TokenizerError` where one
    of our templates writes control tokens that the tokenizer does not have: as plain text they
    would be learnt letter by letter, and no turn would have an end.
    """
    if name in template_names():
        text = (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
        written = set(re.findall(r"<\|\w+\|>", text))
        missing = sorted(written - set(tokenizer.get_vocab()))
        if tokenizer.eos_token is None:
            missing.append("eos_token")
        if missing:
            raise TokenizerError(
                f"--chat_template {name}: the tokenizer has no {', '.join(missing)}",
                "use plain, alpaca or llama-2, which end a turn with the tokenizer's own EOS",
            )
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise ConfigError(
                f"--chat_template {name}: neither a file nor one of ours",
                f"give a file, or one of {', '.join(template_names())}",
            )
        text = _read(path)
    check_template(text, f"--chat_template {name}")
    tokenizer.chat_template = text


def take_template(tokenizer: Any, directory: Path) -> None:
    """Give a tokenizer the template that was saved beside an adapter, where there is one."""
    if (directory / SAVED).exists():
        text = _read(directory / SAVED)
        check_template(text, str(directory / SAVED))
        tokenizer.chat_template = text


def _read(path: Path) -> str:
    if not path.is_file():
        raise UnsafeInputError(f"{path}: the chat template is no plain file", "give a text file")
    if path.stat().st_size > SIZE_LIMIT:
        raise DataError(f"{path}:1: the template is larger than 1 MiB", "give a chat template")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:1: byte offset {error.start} is not UTF-8", "save the file as UTF-8"
        ) from error

"""The chat template of a tokenizer: its own, one of ours by name, or a file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.config.data import DataConfig, assignments
from qlora_kit.data.sandbox import SIZE_LIMIT, check_template, today, variables_of
from qlora_kit.errors import ConfigError, DataError, TokenizerError, UnsafeInputError
from qlora_kit.files.atomic import write_plain
from qlora_kit.files.kind import refuse_kind

DIRECTORY = Path(__file__).parent / "templates"
SAVED = "chat_template.jinja"
"""The file in which transformers looks for a tokenizer's template first."""
OTHERS = "additional_chat_templates"
"""The folder of a tokenizer's other templates, by name: tool_use.jinja, rag.jinja."""
MOST_TEMPLATES = 32


@dataclass(frozen=True)
class ChatOptions:
    """What a run decides about its chats beside the template."""

    date: str | None = None
    """the day that templates are told, as 2026-01-31; None: today"""
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    train_on: str = "all"
    """assistant turns of a chat: `all` or the `last`"""
    merge_system: bool = False


NO_OPTIONS = ChatOptions()


def chat_options(options: DataConfig) -> ChatOptions:
    """The options about chats among those of a run's data."""
    variables = assignments(options.chat_template_args) if options.chat_template_args else {}
    return ChatOptions(options.chat_date, variables, options.train_on, options.merge_system)


def check_chat_options(tokenizer: Any, chat: ChatOptions) -> None:
    """Refuse what no template of the tokenizer reads. Errors: `ConfigError`, `TokenizerError`."""
    known = set[str]()
    for name, text in templates_of(tokenizer).items() if chat.variables else ():
        known |= variables_of(text, f"the tokenizer's {name} template")
    for name in chat.variables:
        if name in GIVEN or name not in known:
            others = ", ".join(sorted(known - GIVEN - set(tokenizer.special_tokens_map)))
            raise ConfigError(
                f"chat_template_args {name}: the chat template has no such variable",
                f"leave it out{f', or give one of {others}' if others else ''}",
            )
    if chat.date is not None and not is_dated(tokenizer):
        raise ConfigError(
            f"chat_date {chat.date}: the chat template asks for no date", "leave it out"
        )


GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "namespace"}
GIVEN |= {"dict", "range", "strftime_now"}
"""What every template is given, which is no variable of a run."""


def templates_of(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's templates by name; the one that rows without tools take is `default`."""
    found = tokenizer.chat_template or {}
    texts = found if isinstance(found, Mapping) else {"default": found}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def is_dated(tokenizer: Any) -> bool:
    """Whether a chat of this tokenizer depends on the day on which it is written."""
    return any("strftime_now" in text for text in templates_of(tokenizer).values())


def date_of(tokenizer: Any, chosen: str | None) -> str | None:
    """The day that a run's chats are written on: the chosen one, else today; None: on no day."""
    return (chosen or today()) if is_dated(tokenizer) else None


def template_names() -> list[str]:
    """The names of the project's own templates."""
    return sorted(path.stem for path in DIRECTORY.glob("*.jinja"))


def use_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer the template of that name or file; it is then saved with the tokenizer.

    Of a directory, such as an adapter's, it takes all templates that lie there.

    Errors: `ConfigError` for an unknown name, `DataError` for a file, `TokenizerError` where one
    of our templates writes control tokens that the tokenizer does not have: as plain text they
    would be learnt letter by letter, and no turn would have an end.
    """
    own = templates_of(tokenizer)
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
    elif name in own and name != "default":
        text = own[name]
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise ConfigError(
                f"--chat_template {name}: neither a file nor one of ours",
                f"give a file, or one of {', '.join([*template_names(), *sorted(own)])}",
            )
        if path.is_dir() and take_template(tokenizer, path):
            return
        text = _read(path)
    check_template(text, f"--chat_template {name}")
    tokenizer.chat_template = text


def take_template(tokenizer: Any, directory: Path) -> bool:
    """Give a tokenizer the templates that were saved beside an adapter; whether there are some."""
    found = read_templates(directory)
    if found:
        tokenizer.chat_template = found["default"] if found.keys() == {"default"} else found
    return bool(found)


def has_templates(directory: str | os.PathLike[str]) -> bool:
    """Whether templates lie in a directory as files of their own."""
    return bool(_template_files(Path(directory)))


def read_templates(directory: Path) -> dict[str, str]:
    """The templates that lie in a directory as files of their own, by name, each one checked.

    As transformers reads them: chat_template.jinja is `default`, the others have their own names.
    """
    files = _template_files(directory)
    texts = {name: _read(path) for name, path in files.items()}
    for name, text in texts.items():
        check_template(text, str(files[name]))
    return texts


def _template_files(directory: Path) -> dict[str, Path]:
    """Templates by name. Errors: `UnsafeInputError` for too many."""
    files = {"default": directory / SAVED} if os.path.lexists(directory / SAVED) else {}
    others = sorted((directory / OTHERS).glob("*.jinja"))
    if len(others) > MOST_TEMPLATES:
        raise UnsafeInputError(
            f"{directory / OTHERS}: holds {len(others)} templates", f"keep {MOST_TEMPLATES} at most"
        )
    return files | {path.stem: path for path in others}


def write_templates(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer's templates as transformers does, so that they are read again."""
    texts = templates_of(tokenizer)
    for name, text in texts.items():
        path = directory / (SAVED if name == "default" else f"{OTHERS}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        write_plain(path, text.encode())


def _read(path: Path) -> str:
    if not path.is_file():
        raise UnsafeInputError(f"{path}: the chat template is no plain file", "give a text file")
    if path.stat().st_size > SIZE_LIMIT:
        raise DataError(f"{path}:1: the template is larger than 1 MiB", "give a chat template")
    content = path.read_bytes()
    refuse_kind(path, DataError, start=content)
    try:
        return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:1: byte offset {error.start} is not UTF-8", "save the file as UTF-8"
        ) from error

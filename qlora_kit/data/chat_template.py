"""The chat template of a tokenizer: its own, one of ours by name, or a file; and what it writes.

A template is a program out of a file, so `template_worker.py` runs it in Jinja's immutable sandbox,
in a process with limits on time, memory and what is written (transformers 5.x, Jinja 3.1).
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_kit.config.data import DataConfig, assignments
from qlora_kit.errors import ConfigError, DataError, ResourceError, TokenizerError, UnsafeInputError
from qlora_kit.files.atomic import write_plain
from qlora_kit.files.kind import refuse_kind
from qlora_kit.process.worker import MemoryLimitError, TimeLimitError, Worker

TIME_LIMIT_S = 3.0
"""Of the processor, for one rendering; a second more for each million characters of messages."""

SIZE_LIMIT = 1024**2
"""Characters of a template, and of what it writes beyond ten times its input's."""

MEMORY_LIMIT = 640 * 1024**2
"""Bytes of the process's address space, beyond 64 for each character of the messages."""

OPEN, CLOSE, LITERAL = "\ue000", "\ue001", "\ue002"
"""Marks around generated text, and around the numbers that stand for control tokens in messages.

Private characters; `rendering.py` hides those that a message holds itself.
"""

_worker = Worker("qlora_kit.data.template_worker:answer")


def today() -> str:
    """This day, as templates are told it: 2026-01-31."""
    return datetime.now().date().isoformat()


def render(
    template: str,
    where: str,
    variables: Mapping[str, Any],
    input_size: int,
    date: str | None = None,
) -> str:
    """What a template writes; `input_size` is the number of characters in its messages.

    `date` is what the template gets for now: the midnight at which that day begins; None: today.

    Errors: `UnsafeInputError` beyond the limits or out of the sandbox, `DataError` where the
    template refuses the messages, `TokenizerError` where it is no template.
    """
    question: dict[str, Any] = {"do": "render", "variables": variables, "date": date or today()}
    question |= {"template": template, "size": 10 * input_size + SIZE_LIMIT}
    return str(_result(_answer(question, input_size), where))


def check_template(template: str, where: str) -> None:
    """Refuse a text that is no template. Errors: `TokenizerError`, `UnsafeInputError`."""
    _result(_described(template), where)


def literal_text(template: str) -> str:
    """Everything that a template itself can write, the pieces apart."""
    return str(_result(_described(template), "the tokenizer")["literal"])


def variables_of(template: str, where: str) -> frozenset[str]:
    """Names that a template reads and does not set itself everywhere. Errors: as above."""
    return frozenset(_result(_described(template), where)["variables"])


@functools.lru_cache(maxsize=64)
def _described(template: str) -> dict[str, Any]:
    return _answer({"do": "describe", "template": template}, 0)


def _answer(question: dict[str, Any], input_size: int) -> dict[str, Any]:
    """A result, or of which kind the refusal is and what it says. Errors: `ResourceError`."""
    seconds, memory = TIME_LIMIT_S + input_size / 1e6, MEMORY_LIMIT + 64 * input_size
    try:
        return dict(_worker.ask(question, seconds=seconds, memory=memory))
    except TimeLimitError:
        why = f"it ran longer than {seconds:.3g} s"
    except MemoryLimitError:
        why = "it takes more memory than a template may have"
    except RecursionError:
        why = "the messages are nested too deeply"
    except ChildProcessError as error:
        raise ResourceError(
            "the process for the chat template ends at once",
            "free some memory, or raise the limits on it (ulimit)",
        ) from error
    except OSError as error:
        raise ResourceError(
            f"no process for the chat template can be started: {error.strerror}",
            "end other processes, or raise the limit on them (ulimit -u)",
        ) from error
    return {"kind": "stopped", "message": why}


def _result(answer: dict[str, Any], where: str) -> Any:
    """What was answered. Errors: those of `render`, for the place `where` a template is used."""
    if "result" in answer:
        return answer["result"]
    message = answer["message"]
    if answer["kind"] == "syntax":
        raise TokenizerError(
            f"{where}: the chat template is no Jinja template: {message}",
            "correct it, or use another (--chat_template)",
        )
    if answer["kind"] == "refused":
        raise DataError(
            f"{where}: the chat template refuses the messages: {message}",
            "give the order and the roles that the model was made for",
        )
    raise UnsafeInputError(
        f"{where}: the chat template was stopped: {message}",
        "use another template (--chat_template)",
    )


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

"""Chat templates run in a process of their own, with limits on time, memory and what they write.

A template is a program out of a file, and what it can be made to do by numbers, widths, formats,
bytes or nested values has no end that could be listed. So `template_worker.py` runs it, in Jinja's
immutable sandbox and in a process that the system bounds.

Sources: transformers' `chat_template_utils.py` (5.x); Jinja 3.1, "Sandbox".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from qlora_kit.errors import DataError, ResourceError, TokenizerError, UnsafeInputError
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

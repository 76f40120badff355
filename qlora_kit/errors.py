"""The errors a caller can meet, each with its exit code, and the line a terminal shows for one.

Every error says what is wrong (with the file, line or flag and the value) and what to do about it.
The two halves are kept apart until they are printed, so that a long problem is cut before the
remedy is. Bad input never surfaces as a bare `KeyError`, `AssertionError` or `JSONDecodeError`.
What is printed holds no token of the environment and no control character out of a file.
"""

from __future__ import annotations

import bisect
import errno
import re

from qlora_kit.process.signals import Stopped
from qlora_kit.process.streams import plain
from qlora_kit.redact import known_secrets

ERROR_LINE_LIMIT = 400
"""Characters of the error line on stderr, `error: ` included."""
SHORTEST_WORD = 48
"""Characters that are left of a long value in a line that is too long."""


class QloraKitError(Exception):
    """Base of all errors; `problem` is what is wrong, `remedy` what to do."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}{_between(self.problem)} {self.remedy}"


class ConfigError(QloraKitError):
    """A flag, a config file or an argument is wrong."""

    exit_code = 2


class InputError(QloraKitError):
    """A file that was handed in is wrong; the subclasses say which kind."""

    exit_code = 3


class ModelError(InputError):
    """A base model directory cannot be used as it is."""


class TokenizerError(InputError):
    """The tokenizer is missing, broken or does not fit the model."""


class DataError(InputError):
    """A data file cannot be read; the problem starts with `file:line`."""


class AdapterError(InputError):
    """An adapter is broken, unsupported or belongs to another base."""


class CheckpointError(InputError):
    """A checkpoint is incomplete or was changed."""


class UnsafeInputError(InputError):
    """The input asks for something that is never done: pickles, remote code, paths that leave."""


class ResourceError(QloraKitError):
    """The device, the memory, the disk or a permission is not there."""

    exit_code = 4


class ExportError(QloraKitError):
    """An export could not be written."""

    exit_code = 4


class NumericError(QloraKitError):
    """A number is not finite, diverges, or no gradient arrives."""

    exit_code = 5


def error_line(error: QloraKitError | Stopped) -> str:
    """`error: problem; remedy` on one line of at most `ERROR_LINE_LIMIT` characters.

    Of a problem that needs no remedy it is `error: problem`.

    Where it is longer, long values lose their middles first, so that the reason behind a path
    stays; then the problem loses its end, and the remedy does last.
    """
    problem, remedy = (one_line(redacted(part)) for part in (error.problem, error.remedy))
    room = ERROR_LINE_LIMIT - len("error: ; ")
    problem = _shorter(problem, room - len(remedy))
    remedy = _shorter(remedy, room - len(problem))
    problem = _cut(problem, max(40, room - len(remedy)))
    left = remedy[: room - len(problem)]
    return f"error: {problem}{_between(problem)} {left}" if left else f"error: {problem}"


def _shorter(text: str, limit: int) -> str:
    """`text` with the middles of its longest words left out, as far as it is above `limit`."""
    words = text.split(" ")
    if len(text) <= limit or len(words) == 1:  # of one word there is no reason behind it
        return text

    def fits(length: int) -> bool:
        return sum(min(len(word), length) + 1 for word in words) - 1 <= limit

    lengths = range(SHORTEST_WORD, max(limit, SHORTEST_WORD) + 1)
    length = lengths[max(0, bisect.bisect_left(lengths, True, key=lambda n: not fits(n)) - 1)]
    return " ".join(middle_out(word, length) for word in words)


def middle_out(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, its beginning and its end."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def redacted(text: str) -> str:
    """`text` without secrets: the environment's, the hub's tokens, a stored login, an address's."""
    for secret in known_secrets():
        text = text.replace(secret, "***")
    text = re.sub(r"(hf|api_org)_[A-Za-z0-9]{16,}", r"\1_***", text)
    return re.sub(r"://[^/\s@]+@", "://***@", text)


def excerpt(text: str, limit: int = 60) -> str:
    """`text` without its middle, redacted before it is cut, for half a token is not seen."""
    return middle_out(redacted(text), limit)


def one_line(text: str) -> str:
    """One line that a terminal shows as it stands: control characters are escaped."""
    return plain(" ".join(text.split()))


def from_os_error(error: OSError) -> ResourceError:
    """The `ResourceError` that stands for a failed call of the operating system."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space or choose another place with --output_dir"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose a place you may write to, or change its permissions"
    else:
        remedy = "check that the path exists and can be used"
    return ResourceError(f"{where}{what}", remedy)


def _between(problem: str) -> str:
    """What ends a problem before its remedy."""
    return "" if problem.endswith("?") else ";"

"""The errors a caller can meet, each with its exit code, and the line a terminal shows for one.

Every error says what is wrong (with the file, line or flag and the value) and what to do about it.
The two halves are kept apart until they are printed, so that a long problem is cut before the
remedy is. Bad input never surfaces as a bare `KeyError`, `AssertionError` or `JSONDecodeError`.
What is printed holds no token of the environment and no control character out of a file.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from qlora_kit.out_of_memory import LimitTooLowError, memory_behind, ran_into_limit
from qlora_kit.redact import known_secrets
from qlora_kit.signals import Stopped, StopSignals
from qlora_kit.start import ready_for_torch
from qlora_kit.streams import Stream, guarded, plain

MEMORY_LINE = (
    b"error: out of memory; lower --batch_size, --max_length or --bits, or raise the limit on "
    b"memory (ulimit -v)\n"
)
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
        return f"{self.problem}; {self.remedy}"


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

    Where it is longer, long values lose their middles first, so that the reason behind a path
    stays; then the problem loses its end, and the remedy does last.
    """
    problem, remedy = (_plain(redacted(part)) for part in (error.problem, error.remedy))
    room = ERROR_LINE_LIMIT - len("error: ; ")
    problem = _shorter(problem, room - len(remedy))
    remedy = _shorter(remedy, room - len(problem))
    problem = _cut(problem, max(40, room - len(remedy)))
    return f"error: {problem}; {remedy[: room - len(problem)]}"


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


def _plain(text: str) -> str:
    """One line that a terminal shows as it stands: control characters are escaped."""
    return plain(" ".join(text.split()))


MEMORY_REMEDIES = {
    "finetune": "lower --batch_size, --max_length or --bits, use --gradient_checkpointing full",
    "evaluate": "lower --batch_size, --max_length or --bits",
    "generate": "lower --batch_size, --max_new_tokens or --bits",
    "export": "use --dtype bf16 or a smaller --shard_size",
    "show_data": "show shorter rows",
}
"""What takes less memory, in flags that the command has."""


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


def reports_errors(
    main: Callable[[Sequence[str] | None], int], *, output_is_product: bool = True
) -> Callable[[Sequence[str] | None], int]:
    """Wrap a command's `main`: an error becomes its line on stderr and its exit code.

    With `--debug` among the arguments the traceback is printed before the line. A command whose
    product is what it prints ends where that cannot be written: with an error, or well where its
    reader left. One that leaves files goes on without (`output_is_product=False`).
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if argv is None else list(argv)
        required = output_is_product or not {"-h", "--help"}.isdisjoint(arguments)
        code, failure = 0, None
        with guarded(required) as output:
            try:
                with StopSignals(), ready_for_torch(), _short_warnings():
                    code = main(arguments)
                    output.flush()
            except BaseException as error:
                failure = error
            good = failure is None or isinstance(failure, SystemExit)
            if good and required and output.lost is not None and not output.settled:
                failure = output.lost  # others may have caught it, as argparse does
            if isinstance(failure, BrokenPipeError) and failure is output.lost:
                return 0  # `| head` has what it wanted
            name = main.__module__.rpartition(".")[2]
            debug = "--debug" in arguments
            return code if failure is None else _report(failure, output, debug, name)

    return wrapped


def _report(error: BaseException, output: Stream, debug: bool, command: str) -> int:
    """Print the line of an error; returns its exit code. The end of `--help` is raised again."""
    if isinstance(error, KeyboardInterrupt):
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        print(error_line(stopped), file=sys.stderr)
        return stopped.exit_code
    if not isinstance(error, Exception):
        raise error
    try:
        failure = _stands_for(error, command)
        if error is output.lost:
            failure = ResourceError(output.problem, "free some space, or send the output elsewhere")
        if failure is not error:
            failure.__cause__ = error
        if debug:
            print(plain(redacted("".join(traceback.format_exception(failure)))), file=sys.stderr)
        print(error_line(failure), file=sys.stderr)
        return failure.exit_code
    except MemoryError:
        # Not even for the line is there room: this one is there already.
        with contextlib.suppress(OSError):
            os.write(2, MEMORY_LINE)
        return ResourceError.exit_code


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Let a warning be one line, without the place in the source that gave it."""

    def line(message: Warning | str, *where: object, **options: object) -> str:
        return f"warning: {_plain(redacted(str(message)))}\n"

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _stands_for(error: Exception, command: str) -> QloraKitError:
    """Name what the system or torch raise; everything else is called a bug of ours.

    An error of ours that only passes on that memory ended, such as a model that could not be
    built, is named so too. A template that asks for too much is not: that is its fault.
    """
    known = isinstance(error, (QloraKitError, OSError))
    passes_on = isinstance(error, InputError) and not isinstance(error, UnsafeInputError)
    behind = memory_behind(error) if passes_on or not isinstance(error, QloraKitError) else None
    if behind is None and not known and ran_into_limit():
        behind = error
    if isinstance(behind, LimitTooLowError):
        return ResourceError(str(behind), "raise it, or lift it with ulimit -v unlimited")
    if behind is not None:
        lower = MEMORY_REMEDIES.get(command, "use a smaller model")
        return ResourceError(
            f"out of memory ({type(behind).__name__}: {str(behind) or 'no more is said'})",
            f"{lower}, or raise the limit on memory (ulimit -v)",
        )
    if isinstance(error, QloraKitError):
        return error
    if isinstance(error, OSError):
        failed = from_os_error(error)
        if command in ("generate", "evaluate", "show_data", "plan"):  # they have no such flag
            failed.remedy = failed.remedy.removesuffix(" or choose another place with --output_dir")
        return failed
    return QloraKitError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )

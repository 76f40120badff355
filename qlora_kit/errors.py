"""The errors a caller can meet, each with its exit code, and the line a terminal shows for one.

Every error says what is wrong (with the file, line or flag and the value) and what to do about it.
The two halves are kept apart until they are printed, so that a long problem is cut before the
remedy is. Bad input never surfaces as a bare `KeyError`, `AssertionError` or `JSONDecodeError`.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence

ERROR_LINE_LIMIT = 400
"""Characters of the error line on stderr, `error: ` included."""


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


def error_line(error: QloraKitError) -> str:
    """`error: problem; remedy` on one line of at most `ERROR_LINE_LIMIT` characters."""
    problem, remedy = (" ".join(part.split()) for part in (error.problem, error.remedy))
    room = ERROR_LINE_LIMIT - len("error: ; ") - len(remedy)
    if room < 40:
        remedy = remedy[: len(remedy) - (40 - room)]
        room = 40
    if len(problem) > room:
        problem = problem[: room - 3] + "..."
    return f"error: {problem}; {remedy}"


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
    main: Callable[[Sequence[str] | None], int],
) -> Callable[[Sequence[str] | None], int]:
    """Wrap a command's `main`: an error becomes its line on stderr and its exit code.

    With `--debug` among the arguments the traceback is printed before the line.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if argv is None else list(argv)
        try:
            return main(arguments)
        except QloraKitError as error:
            failure = error
        except KeyboardInterrupt:
            print("error: interrupted; nothing more was written", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our output left (`| head`): point stdout at nothing and go quietly.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            failure = from_os_error(error)
            failure.__cause__ = error
        except MemoryError as error:
            failure = ResourceError(
                "the host's memory is used up", "use a smaller batch, length or model"
            )
            failure.__cause__ = error
        except Exception as error:
            failure = _stands_for(error)
            failure.__cause__ = error
        if "--debug" in arguments:
            traceback.print_exception(failure)
        print(error_line(failure), file=sys.stderr)
        return failure.exit_code

    return wrapped


def _stands_for(error: Exception) -> QloraKitError:
    """Name what torch raises when a device is full; everything else is called a bug of ours."""
    # torch is not imported for this: `--help` and bad flags must answer without it.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return ResourceError(
            f"out of memory: {error}",
            "lower --batch_size, --max_length or --bits, or use --gradient_checkpointing full",
        )
    return QloraKitError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )

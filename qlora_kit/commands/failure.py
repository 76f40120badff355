"""How a command ends: an error becomes its line on stderr and its exit code.

Everything that a command needs of its process stands around it here: signals, streams that fail
nothing, what is made ready before torch is imported, warnings of one line.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from qlora_kit.errors import (
    InputError,
    QloraKitError,
    ResourceError,
    UnsafeInputError,
    error_line,
    from_os_error,
    one_line,
    redacted,
)
from qlora_kit.process.out_of_memory import LimitTooLowError, memory_behind, ran_into_limit
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.process.start import ready_for_torch
from qlora_kit.process.streams import Stream, guarded, plain

MEMORY_LINE = (
    b"error: out of memory; lower --batch_size, --max_length or --bits, or raise the limit on "
    b"memory (ulimit -v)\n"
)
MEMORY_REMEDIES = {
    "finetune": "lower --batch_size, --max_length or --bits, use --gradient_checkpointing full",
    "evaluate": "lower --batch_size, --max_length or --bits",
    "generate": "lower --batch_size, --max_new_tokens or --bits",
    "chat": "send /reset, lower --max_new_tokens or --bits",
    "export": "give --verify FILE with a few short rows",
    "quantize": "give --verify FILE with a few short rows",
    "serve": "lower --max_batch, --max_length or --bits",
    "show_data": "show shorter rows",
}
"""What takes less memory, in flags that the command has."""
WITHOUT_OUTPUT_DIR = ("generate", "chat", "evaluate", "show_data", "plan", "serve", "cache", "runs")
"""Commands that have no such flag."""


def reports_errors(
    main: Callable[[Sequence[str]], int], *, output_is_product: bool = True
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
        failure = stands_for(error, command)
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
        return f"warning: {one_line(redacted(str(message)))}\n"

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        warnings.formatwarning = before


def stands_for(error: Exception, command: str) -> QloraKitError:
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
        if command in WITHOUT_OUTPUT_DIR:
            failed.remedy = failed.remedy.removesuffix(" or choose another place with --output_dir")
        return failed
    return QloraKitError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )

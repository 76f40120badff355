"""Whether what was raised says that memory ended, whatever library says it, and at any moment."""

from __future__ import annotations

import contextlib
import errno
import re
import resource

WORDS = re.compile(
    r"(can't|cannot|unable to|failed to) (allocate|map segment|mmap|create .*thread)|bad_alloc"
    r"|out of memory|could not create a memory|can't start new thread|MemoryError",
    re.IGNORECASE,
)
"""What libraries say then."""
NEAR = 0.8
"""A process whose peak is at this share of its limit has run into it."""


class LimitTooLowError(MemoryError):
    """The process may not take what the libraries take, whatever it is asked for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # torch raises plain RuntimeErrors for the host, a loader of libraries ImportErrors or OSErrors.
    kinds = (RuntimeError, ImportError, OSError)
    return isinstance(error, kinds) and bool(WORDS.search(str(error)))


def memory_behind(error: BaseException) -> BaseException | None:
    """The first of an error and its causes that says that memory ended."""
    one: BaseException | None = error
    for _ in range(50):  # a chain may close
        if one is None or is_out_of_memory(one):
            return one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return None


def ran_into_limit() -> bool:
    """Whether the process came near to its limit on memory (`ulimit -v`), where it has one.

    What fails then may say anything: libraries that get no memory are not always careful.
    """
    with contextlib.suppress(OSError, StopIteration, ValueError):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmPeak:"))
        return limit != resource.RLIM_INFINITY and int(line.split()[1]) * 1024 > NEAR * limit
    return False

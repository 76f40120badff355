"""Whether what was raised says that memory ended, whatever library says it, and at any moment."""

from __future__ import annotations

import contextlib
import errno
import re
import resource

WORDS = re.compile(
    r"(can't|cannot|unable to|failed to) (allocate|map segment|mmap|create .*thread)|bad_alloc"
    r"|out of memory|could not create a memory|can't start new thread|MemoryError"
    r"|STATUS_ALLOC(ATION)?_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
"""What libraries say then; cuBLAS, cuDNN, cuSPARSE and cuRAND in their status."""
SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", re.IGNORECASE)
"""What torch's allocators say that was asked for, and that was there."""
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


def missing_bytes(said: str) -> int | None:
    """By how much an allocator fell short, as far as its message says it.

    That is one allocation: what the step asks for later is not known. Where more was free than
    was asked for (in pieces, or above a limit of the process) it is all that was asked for.
    """
    asked = _size_in(ASKED, said)
    if asked is None:
        return None
    short = asked - (_size_in(FREE, said) or 0)
    return short if short > 0 else asked


def _size_in(pattern: re.Pattern[str], said: str) -> int | None:
    found = pattern.search(said)
    if found is None:
        return None
    unit = next(size for name, size in SIZES.items() if name.lower() == found[2].lower())
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


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

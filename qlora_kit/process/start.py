"""What a command makes ready at the moment that torch is imported, wherever that is.

Threads that wait for each other sleep instead of spinning: where another process is busy on the
same cores, spinning keeps the one thread from running that all wait for, and a step takes ten
times as long. OpenMP reads that once, when it is loaded.

Torch's CUDA allocator reads its settings once, too. With expandable segments it takes memory page
by page, instead of in pieces of which remainders stay over that nothing fits into.

Where the limit on memory (`ulimit -v`) does not hold the libraries, some of them end the process in
the middle of their import or of their first product; so that is refused first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder

from qlora_kit.process.out_of_memory import LimitTooLowError

FIRST = ("torch", "numpy")
"""Whichever comes first: a command that imports the one imports the other."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user may have said about it."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""How a user sets torch's allocator: the first since torch 2.9, which warns of the second."""
NEEDED_BYTES = 1024**3
"""Address space that a command takes before any model: 720 MB with everything imported, then the
workspaces and threads of the first products, whose libraries end the process where they get none.
"""


@contextlib.contextmanager
def ready_for_torch() -> Iterator[None]:
    """Inside, the first import of torch finds everything ready. Errors: `LimitTooLowError`."""
    finder = _BeforeTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _BeforeTorch(MetaPathFinder):
    """Finds nothing; it is only asked first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in FIRST:
            if not any(variable in os.environ for variable in WAITING):
                os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
            if not any(variable in os.environ for variable in ALLOCATOR):
                os.environ.update(allocator_settings(_torch_version(), platform.release()))
            _check_limit()


def allocator_settings(torch_version: str, kernel: str) -> dict[str, str]:
    """The variable that gives this torch expandable segments, where they work.

    Not on WSL 2, where the first allocation may end in "CUDA driver error" (pytorch#192330), and
    not with ROCm, whose builds warn that they do not have them.
    """
    if "microsoft" in kernel.lower() or "rocm" in torch_version:
        return {}
    release = re.match(r"(\d+)\.(\d+)", torch_version)
    old = release is not None and (int(release[1]), int(release[2])) < (2, 9)
    return {ALLOCATOR[1 if old else 0]: "expandable_segments:True"}


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check_limit() -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < NEEDED_BYTES:
        raise LimitTooLowError(
            f"the limit on memory (ulimit -v) is {limit} bytes, and a command takes "
            f"{NEEDED_BYTES} before any model"
        )

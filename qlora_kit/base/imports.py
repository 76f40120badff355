"""How bitsandbytes is imported: without a word, and without the compiler that it does not use.

bitsandbytes 0.50 decorates fallbacks with `torch.compile`, which imports torch's compiler at once:
a fifth of the time that a command takes to start. None of them runs where a native kernel is found.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Inside, nothing is printed, and what `torch.compile` decorates compiles at its first call."""
    compile_now = torch.compile
    torch.compile = functools.partial(_compiled_when_called, compile_now)  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        torch.compile = compile_now


def _compiled_when_called(
    compile_now: Callable[..., Any], model: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`torch.compile(model, **options)`, or the decorator where there is no function yet."""
    if model is None:
        return functools.partial(_compiled_when_called, compile_now, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return compile_now(model, **options)  # type: ignore[no-any-return]

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call

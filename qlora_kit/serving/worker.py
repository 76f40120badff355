"""A thread that does one thing after another, and keeps no process from ending.

The threads of a `ThreadPoolExecutor` are waited for when Python ends, however long their work is.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """The thread, and what it has to do."""

    def __init__(self, name: str) -> None:
        self._tasks = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Have something done; what is cancelled before its turn is left out."""
        future = Future[Any]()
        self._tasks.put((future, work))
        return future

    async def do(self, work: Callable[[], Any]) -> Any:
        """What something gives, once it is done. Errors: its own."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Leave out what waits, and let the thread end behind what it does now."""
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task[0].cancel()
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # an answer's tokens, until the next one comes

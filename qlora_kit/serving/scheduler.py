"""One thread has the model: requests join and leave the batch between two of its steps.

A request waits in a queue of limited length until one of `max_batch` places is free, and the cache
of all rows, at their full lengths, has room in `cache_bytes` with its own. Each turn of
the thread drops whose client has left, fills free places, lets the engine draw a token for every
row, and hands on the text that became final. What concerns one request (a stop string, its end, a
fault) ends it alone; a fault of the step itself ends those that were in it, and the thread goes on.

An adapter that is to be removed takes no new requests from then on; it may leave the bank once its
last request has got its place and ended.

Texts are made of tokens here, for a stop string frees its place at once. Everything else of a
request (its body, its template, its tokens) is done before, by other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Ticket
from qlora_kit.generation.text import AnswerText
from qlora_kit.serving.answer import Event, Job
from qlora_kit.serving.errors import closing, from_error, no_model, queue_full

FAILURES = 3  # steps in a row: nothing is expected of the next


class Scheduler:
    """The thread, the jobs that wait for it, and those that it has in its batch."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        max_queue: int,
        cache_bytes: int | None = None,
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`report` is told of faults that are not the request's."""
        self._engine, self._cache_bytes, self._report = engine, cache_bytes, report
        self.max_batch, self.max_queue = max_batch, max_queue
        self._loop: asyncio.AbstractEventLoop | None = None
        # Guards what follows; waited for by the thread while there is nothing to do.
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._places = self.failures = 0  # failed steps in a row
        self._running: dict[Ticket, tuple[Job, AnswerText]] = {}
        self._retiring: dict[str, Callable[[], None]] = {}
        self._deadline_s: float | None = None
        self.closes = asyncio.Event()
        """set, in the loop, when no more jobs are taken"""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; events go to jobs of this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """How many jobs are in the batch, and how many wait or have a place to do so."""
        return len(self._running), len(self._waiting) + self._places

    @property
    def is_closing(self) -> bool:
        """Whether no more jobs are taken."""
        return self._deadline_s is not None

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Within this a job is made that `submit` may take. Errors: `ApiError` where all is full.

        What is made of a request's text waits already.
        """
        with self._changed:
            if self.is_closing:
                raise closing()
            running, waiting = self.counts
            if running + waiting >= self.max_batch + self.max_queue:
                raise queue_full(waiting)
            self._places += 1
        try:
            yield
        finally:
            with self._changed:
                self._places -= 1

    @property
    def has_ended(self) -> bool:
        """Whether the thread was started and is no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Let a job wait, within its `place`. Errors: `ApiError` where it may not."""
        with self._changed:
            if self.is_closing:
                raise closing()
            if (adapter := job.request.adapter) in self._retiring:
                raise no_model(str(adapter), [])
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job that nobody waits for: its place is free before the next step."""
        with self._changed:
            job.left = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def retire(self, adapter: str, then: Callable[[], None]) -> None:
        """Take no more jobs of an adapter; once its last one has ended the thread calls `then`."""
        with self._changed:
            self._retiring[adapter] = then
            self._changed.notify()

    def is_retiring(self, adapter: str) -> bool:
        """Whether an adapter is on its way out."""
        return adapter in self._retiring

    def close(self, grace_s: float) -> None:
        """Take no more jobs; end those in the batch after so many seconds, and then the thread."""
        with self._changed:
            if self._deadline_s is None:
                self._deadline_s = time.monotonic() + grace_s
            self._changed.notify()
        self._in_loop(self.closes.set)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._has_work():
            try:
                self._turn()
                self.failures = 0
            except Exception as error:
                self.failures += 1
                self._fail_all(error)
            except BaseException as error:
                self._fail_all(RuntimeError(f"the model's thread ended: {error!r}"))
                raise

    def _has_work(self) -> bool:
        """Wait for something to do; whether there is, or everything is over."""
        with self._changed:
            while not (self._waiting or self._running or self._retiring or self.is_closing):
                self._changed.wait()
            return bool(self._running) or not self.is_closing or bool(self._waiting)

    def _turn(self) -> None:
        self._drop_left()
        self._end_if_closing()
        self._admit()
        self._retire_idle()
        if not self._running:
            with self._changed:
                # What is retiring has ended its jobs, or waits for one that waits for a place.
                if not self._waiting:
                    return
        self._deliver(self._step())

    def _drop_left(self) -> None:
        for ticket, (job, _) in list(self._running.items()):
            if job.left:
                self._engine.drop(ticket)
                del self._running[ticket]

    def _end_if_closing(self) -> None:
        if self._deadline_s is None:
            return
        with self._changed:
            ended = list(self._waiting)
            self._waiting.clear()
        if time.monotonic() > self._deadline_s:
            ended += self._dropped()
        self._deliver((job, Event(error=closing())) for job in ended)

    def _dropped(self) -> list[Job]:
        """The jobs of the batch, taken out of it."""
        running, self._running = self._running, {}
        for ticket in running:
            with contextlib.suppress(Exception):  # after a fault that is said already
                self._engine.drop(ticket)
        return [job for job, _ in running.values()]

    def _admit(self) -> None:
        """Fill free places with those that wait longest."""
        while len(self._running) < self.max_batch:
            with self._changed:
                if not self._waiting or not self._has_room(self._waiting[0]):
                    return
                job = self._waiting.popleft()
            if job.left:
                continue
            try:
                ticket = self._engine.add(job.request)
                text = AnswerText(job.tokenizer, after=job.request.ids, stops=job.stops)
            except Exception as error:
                self._deliver([(job, self._failed(error))])
                continue
            job.began_s = time.monotonic()
            self._running[ticket] = job, text

    def _has_room(self, job: Job) -> bool:
        """Whether the cache may take one more row; one by itself always may."""
        if self._cache_bytes is None or not self._running or job.left:
            return True
        requests = [job.request, *(one.request for one, _ in self._running.values())]
        longest = max(len(one.ids) + one.max_new_tokens for one in requests)
        return (self._engine.cache_bytes(longest, len(requests)) or 0) <= self._cache_bytes

    def _step(self) -> list[tuple[Job, Event]]:
        """Draw a token for every row; what became of each."""
        events = []
        for ticket, token in self._engine.step():
            if ticket not in self._running:
                continue  # its last token made a stop string
            job, text = self._running[ticket]
            try:
                event = self._pushed(job, text, ticket, token)
            except Exception as error:
                event = self._failed(error)
            if event.is_last:
                del self._running[ticket]
                self._engine.drop(ticket)
            if event.text or event.is_last:
                events.append((job, event))
        return events

    def _pushed(self, job: Job, text: AnswerText, ticket: Ticket, token: int | None) -> Event:
        """What a token adds to an answer; None is its end."""
        if ticket.error is not None:
            return self._failed(ticket.error)
        if token is None:
            return Event(text.finish(), "length" if ticket.end == "length" else "stop")
        job.tokens += 1
        piece = text.push(token)
        return Event(piece, "stop" if text.stopped else None)

    def _failed(self, error: Exception) -> Event:
        answer = from_error(error)
        if answer.status >= 500:
            self._report(error)
        return Event(error=answer)

    def _fail_all(self, error: Exception) -> None:
        """End the jobs of a step that failed."""
        event = self._failed(error)
        self._deliver((job, event) for job in self._dropped())

    def _retire_idle(self) -> None:
        with self._changed:
            jobs = [*self._waiting, *(job for job, _ in self._running.values())]
            used = {job.request.adapter for job in jobs}
            free = [name for name in self._retiring if name not in used]
        for name in free:
            try:
                self._retiring[name]()
            except Exception as error:
                self._report(error)
            with self._changed:
                del self._retiring[name]

    def _deliver(self, events: Iterable[tuple[Job, Event]]) -> None:
        """Hand events to their jobs, all of a step at once."""
        events = list(events)
        if not events:
            return

        def put() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        self._in_loop(put)

    def _in_loop(self, work: Callable[[], None]) -> None:
        # Where the loop has ended, so has whoever waited.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(work)

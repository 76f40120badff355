"""A loaded base behind the API: its bank, its scheduler, its names, put together."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable

from qlora_kit.data.batch import padding_id
from qlora_kit.generation.engine import Engine
from qlora_kit.lora.adapter_files import AdapterFiles
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.options.checks import size_text
from qlora_kit.serving.api import Api, Limits
from qlora_kit.serving.guard import Guard
from qlora_kit.serving.listen import url_of
from qlora_kit.serving.models import Model, Models
from qlora_kit.serving.room import Room
from qlora_kit.serving.scheduler import Scheduler
from qlora_kit.serving.server import GRACE_S, run


class Service:
    """The parts of one server. `say` is given the lines of its log, without the time."""

    def __init__(
        self,
        bank: AdapterBank,
        base: Model,
        limits: Limits,
        *,
        max_batch: int,
        max_queue: int,
        key: str | None,
        say: Callable[[str], None],
        open_adapter: Callable[[str, str], Model],
        debug: bool = False,
    ) -> None:
        """`open_adapter` puts the adapter in a directory into the bank, under a name.

        Errors: `ResourceError` where the device has no room for one answer.
        """
        self.bank, self._say, self._debug = bank, say, debug
        self._began_with = sum(map(bank.nbytes, bank.names))
        pad_id = padding_id(base.format.tokenizer)
        engine = Engine(bank.base.model, pad_id=pad_id, bank=bank)
        self.room = Room.of(engine, bank.base.device, limits, max_batch)
        bank.most_of_rows = min(bank.most_of_rows, self.room.rows)
        self.scheduler = Scheduler(
            engine,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=self.room.cache,
            report=self._report,
        )
        self.models = Models(base)
        api = Api(
            self.models,
            self.scheduler,
            self.room.limits,
            vocabulary=bank.base.model.get_input_embeddings().weight.shape[0],
            add_adapter=open_adapter if key is not None else None,
            remove_adapter=bank.remove,
        )
        self.app = Guard(api.app(), key=key, log=say, report=self._report)

    def check_room(self, adapter: AdapterFiles) -> None:
        """Refuse an adapter that there is no room for, before it is read. Errors: `ApiError`."""
        sizes = [entry.end - entry.start for entry in adapter.entries.values()]
        held = sum(map(self.bank.nbytes, self.bank.names)) - self._began_with
        self.room.check_adapter(sum(sizes), held)

    def run(
        self,
        listener: socket.socket,
        *,
        is_asked_to_end: Callable[[], bool],
        grace_s: float = GRACE_S,
    ) -> None:
        """Serve until that is asked for."""
        cache = self.room.cache
        most = "" if cache is None else f", with a cache of up to {size_text(cache)}"
        if self.room.copies:
            most += f", and {size_text(self.room.copies)} of weights laid out for decoding"
        if self.room.note is not None:
            self._say(f"note: {self.room.note}")
        url = url_of(listener)
        what = f"{', '.join(self.models.names)} at {url}/v1, a page to chat at {url}{most}"
        try:
            run(
                self.app,
                listener,
                self.scheduler,
                is_asked_to_end=is_asked_to_end,
                grace_s=grace_s,
                on_start=lambda: self._say(f"serving {what}"),
            )
        finally:
            self.models.close()

    def _report(self, error: BaseException) -> None:
        """Say a fault of the server's own in its log; with `debug` where it is."""
        if self._debug:
            self._say("".join(traceback.format_exception(error)))
        self._say(f"error: {type(error).__name__}: {error}")

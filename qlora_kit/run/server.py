"""A base and its adapters, opened, checked and loaded, behind the API."""

from __future__ import annotations

import time
from collections.abc import Callable

from qlora_kit.config.commands import ServeConfig
from qlora_kit.errors import ConfigError
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named
from qlora_kit.run.prompt_format import format_beside
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.trained_form import form_note, is_plain
from qlora_kit.serving.api import Limits
from qlora_kit.serving.models import Model
from qlora_kit.serving.service import Service


def loaded_service(named: Named, key: str | None, say: Callable[[str], None]) -> Service:
    """What serves them; all are checked against each other before weights are read.

    Errors: `ConfigError`, those of base and adapters.
    """
    options = named.parsed[ServeConfig]
    opened = AdaptedBase.open(named)
    base, bank, formats = opened.base, opened.bank, opened.formats
    if base.source.name in named.adapters:
        raise ConfigError(
            f"adapter {base.source.name} has the name of the base", "give it another one, NAME=DIR"
        )
    limits = Limits.of(base.context, options)
    opened.load()
    if note := form_note(opened.adapters, "/v1/completions answers", plain=False):
        say(f"{time.strftime('%H:%M:%S')} note: {note}")
    bank.use(None)  # each request names its own

    def open_adapter(name: str, directory: str) -> Model:
        adapter = SavedAdapter.open(directory)
        named.check_added(adapter, base.info.as_dict())
        format = format_beside(formats[None], adapter)
        service.check_room(adapter.files)
        bank.add(name, adapter.files, allow_other_base=named.allow_other_base)
        return Model(name, name, format, is_plain(adapter))

    service = Service(
        bank,
        Model(base.source.name, None, formats[None]),
        limits,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        key=key,
        say=lambda line: say(f"{time.strftime('%H:%M:%S')} {line}"),
        open_adapter=open_adapter,
        debug=named.parsed.debug,
    )
    for name, adapter in opened.adapters.items():
        service.models.put(Model(name, name, formats[name], is_plain(adapter)))
    return service

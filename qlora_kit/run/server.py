"""A base and its adapters, opened, checked and loaded, behind the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.config.serve import ServeConfig
from qlora_kit.errors import ConfigError
from qlora_kit.lora.opening import open_adapter
from qlora_kit.run.named_base import Named, base_of
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.serving.api import Limits
from qlora_kit.serving.models import Model
from qlora_kit.serving.service import Service


def loaded_service(
    named: Named, saved: Mapping[str, SavedAdapter], key: str | None, say: Callable[[str], None]
) -> Service:
    """What serves them; all are checked against each other before weights are read.

    Errors: `ConfigError`, those of base and adapters.
    """
    options, allow_other = named.parsed[ServeConfig], named.parsed[AdaptersConfig].allow_other_base
    asked = named.parsed[BaseConfig]
    if named.adapter is not None:
        asked = base_of(named.parsed, named.adapter)
    base = open_base(asked, named.files)
    if base.source.name in saved:
        raise ConfigError(
            f"adapter {base.source.name} has the name of the base", "give it another one, NAME=DIR"
        )
    limits = Limits.of(base.context, options)
    for adapter in saved.values():
        open_adapter(base.model, adapter.files, None if allow_other else base.info)
    read_weights(base)

    def add(name: str, adapter: SavedAdapter) -> Model:
        chat, literal = adapter.chat(), adapter.reads_literally()
        return service.add(name, adapter.files, chat, literal, allow_other)

    service = Service(
        base,
        limits,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        key=key,
        say=lambda line: say(f"{time.strftime('%H:%M:%S')} {line}"),
        open_adapter=lambda name, path: add(name, SavedAdapter.open(path)),
        debug=named.parsed.debug,
    )
    for name, adapter in saved.items():
        service.models.put(add(name, adapter))
    return service

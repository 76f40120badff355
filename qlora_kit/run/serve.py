"""What `serve` starts: a base and its adapters behind the OpenAI API.

What options, the address and the headers of files show is refused before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable

from qlora_kit.config.commands import ServeConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.options.parsed import Parsed
from qlora_kit.process.signals import Stopped, StopSignals
from qlora_kit.run.named_base import Named
from qlora_kit.serving.listen import check_extras, listening


def serve(parsed: Parsed, say: Callable[[str], None]) -> None:
    """Serve until a signal asks to stop; `say` is given the lines of the log.

    Errors: `Stopped` at the end, `ConfigError`, `ResourceError`, those of base and adapters.
    """
    options, adapters = parsed[ServeConfig], parsed[AdaptersConfig]
    check_extras()
    key = options.key()
    named = Named.open(parsed, adapters.named, allow_other_base=adapters.allow_other_base)
    with listening(options.host, options.port) as listener:
        from qlora_kit.run.server import loaded_service

        service = loaded_service(named, key, say)
        with StopSignals() as signals:
            with signals.between_steps("ending: running answers have a few seconds"):
                service.run(listener, is_asked_to_end=lambda: signals.received is not None)
            if signals.received is not None:
                raise Stopped(signals.received, "the server has ended", remedy="")

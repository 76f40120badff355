"""Where the server listens, and its limits."""

from __future__ import annotations

import ipaddress
import os
import re
import typing
from dataclasses import dataclass

from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import MOST_DRAWN, MOST_ROWS, MOST_TOKENS, a_name, between
from qlora_kit.options.option import Options, option
from qlora_kit.redact import OWN_KEY, hide

SHORTEST_KEY, LONGEST_KEY = 8, 256
MOST_WAITING = 100_000


def _key(value: str) -> str | None:
    if re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},{LONGEST_KEY}}}", value):
        return None
    return f"{SHORTEST_KEY} to {LONGEST_KEY} letters, digits and signs without a space"


@dataclass(frozen=True)
class ServeConfig(Options):
    """Where the server listens, who may ask it, and how much at a time."""

    title: typing.ClassVar[str] = "server"

    host: str = option(
        "127.0.0.1",
        "the address to listen on; one that other machines reach (0.0.0.0) needs --api_key",
        check=a_name("an address or a host name"),
        metavar="ADDRESS",
    )
    port: int = option(8000, "the port to listen on; 0: any free one", check=between(0, 65535))
    api_key: str | None = option(
        None,
        f"the key that requests must have; better set {OWN_KEY}, for flags of processes are "
        "seen by everybody on this machine",
        check=_key,
        secret=True,
        metavar="KEY",
        shown_default=f"{OWN_KEY}, or none",
    )
    max_batch: int = option(8, "answers that are written together", check=between(1, MOST_ROWS))
    max_queue: int = option(
        64, "requests that may wait for a place among them", check=between(0, MOST_WAITING)
    )
    max_length: int | None = option(
        None,
        "tokens of a prompt and its answer together",
        check=between(2, MOST_TOKENS),
        shown_default="the model's context",
    )
    max_new_tokens: int = option(
        1024, "most tokens that an answer may have", check=between(1, MOST_DRAWN)
    )

    def key(self) -> str | None:
        """The key that requests must have, the flag's or the variable's; a secret from here on.

        Errors: `ConfigError` for a bad one, and where other machines could ask a server without.
        """
        given = self.api_key if self.api_key is not None else os.environ.get(OWN_KEY) or None
        if given is not None:
            hide(given)
            if allowed := _key(given):
                raise ConfigError(f"{OWN_KEY} must be {allowed}", "set another one")
        elif not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} is reached by other machines, and no API key is given",
                f"set {OWN_KEY}, or leave --host out",
            )
        return given


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"

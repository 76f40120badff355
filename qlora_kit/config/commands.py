"""The options that only one of the other commands has: show-data, plan, runs, chat, serve."""

from __future__ import annotations

import ipaddress
import os
import re
import typing
from dataclasses import dataclass

from qlora_kit.config.data import DEFAULT_LENGTH
from qlora_kit.config.generation import BASE
from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import (
    MOST_DATA,
    MOST_DRAWN,
    MOST_ROWS,
    MOST_TOKENS,
    SEEDS,
    a_name,
    a_size,
    also,
    between,
)
from qlora_kit.options.option import Options, option
from qlora_kit.redact import OWN_KEY, hide


@dataclass(frozen=True)
class ShowConfig(Options):
    """What is shown of the data."""

    title: typing.ClassVar[str] = "what is shown"

    rows: int = option(3, "show this many rows, or pairs, token by token", check=between(0, 10**4))
    batch_size: int = option(
        8,
        "rows of a batch, for the share of padding",
        aliases=("per_device_train_batch_size",),
        check=between(1, MOST_ROWS),
        reads=also({"auto": 8}),
    )
    seed: int = option(42, "of the order and of the share held out, as in finetune", check=SEEDS)
    json: bool = option(False, "print one JSON object and nothing else")
    html: str | None = option(
        None, "also write a page to share", check=a_name(), path=True, metavar="FILE"
    )


@dataclass(frozen=True)
class PlanConfig(Options):
    """What is planned for, and what is shown of it."""

    title: typing.ClassVar[str] = "the plan"

    max_length: int | None = option(
        None,
        "tokens per row, all trained on",
        aliases=("max_seq_length",),
        check=between(2, MOST_TOKENS),
        shown_default=f"{DEFAULT_LENGTH}, or the model's context where that is shorter",
    )
    packing: bool = option(False, "rows hold several shorter ones, isolated from each other")
    device_memory: str | None = option(
        None,
        "memory of the card that is planned for, such as 8GiB",
        check=a_size,
        metavar="SIZE",
        shown_default="what is free here",
    )
    card: str | None = option(
        None,
        "plan for this card, such as rtx4090, rtx3060, t4 or h100-sxm: for its memory, its kernels "
        "and its time",
        check=a_name(),
        metavar="NAME",
        shown_default="the one here, if it is known",
    )
    rows: int | None = option(
        None,
        "rows of a data set, each of --max_length tokens: says the hours of a run on the card",
        check=between(1, MOST_DATA),
    )
    tokens: int | None = option(
        None,
        "tokens of a data set, as show-data counts them: says the hours without any padding",
        check=between(1, MOST_DATA),
    )
    grid: bool = option(
        False, "also the peak, and the tokens/s of a known card, over batch sizes and lengths"
    )
    longest: bool = option(
        False,
        "also the longest rows that fit, at each level of recompute: with these options, and with "
        "all that is left to auto to hold less on the device",
    )
    quantization_error: bool = option(
        False,
        "also read the weights, which have to be here, and say how far each linear is from itself "
        "in 4 or 8 bits, the worst first",
    )
    json: bool = option(False, "print one JSON object and nothing else")

    def _conflicts(self) -> typing.Iterator[str]:
        if self.rows is not None and self.tokens is not None:
            yield f"rows {self.rows} is given beside tokens {self.tokens}: name one of them"


def _two_runs(value: str | tuple[str, ...]) -> str | None:
    two = isinstance(value, tuple) and len(value) == 2 and all(value)
    return None if two else "two runs: --compare A --compare B"


@dataclass(frozen=True)
class RunsConfig(Options):
    """Which runs are listed."""

    title: typing.ClassVar[str] = "runs"

    runs_dir: str = option(
        "runs",
        "the directory that holds the runs, or one run",
        check=a_name(),
        path=True,
        metavar="DIR",
    )
    compare: tuple[str, ...] | None = option(
        None,
        "two runs, each by its name in --runs_dir or by its path (give it twice): the options that "
        "differ, and what each gave",
        check=_two_runs,
        repeated=True,
        metavar="RUN",
    )
    json: bool = option(False, "print JSON and nothing else")


@dataclass(frozen=True)
class CacheConfig(Options):
    """What is done with the cache of quantized bases."""

    title: typing.ClassVar[str] = "the cache"

    clear: str | None = option(
        None,
        "delete what is kept: all, the entry of that name, or every entry of a model",
        check=a_name(),
        metavar="NAME|all",
    )
    json: bool = option(False, "print one JSON object and nothing else")


@dataclass(frozen=True)
class ChatConfig(Options):
    """Who answers at first, and what every chat begins with."""

    title: typing.ClassVar[str] = "chat"

    use: str | None = option(
        None,
        f"the adapter that answers at first, or {BASE}: none of them",
        check=a_name("the name of an adapter"),
        metavar="NAME",
        shown_default="the first one",
    )
    system: str | None = option(
        None, "what the system says before the first message", metavar="TEXT"
    )
    plain: bool = option(
        False,
        "no chat template: every message is a prompt by itself with a line end behind it, as in "
        "rows of prompts and completions, and nothing is read that was said before",
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.plain and self.system is not None:
            yield "system is given beside plain, which writes messages alone: leave one of them out"


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

"""With which adapters a command answers, how tokens are drawn, and what it answers or measures."""

from __future__ import annotations

import functools
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_kit.config.lora import ADAPTER_NAMES, OTHER_BASE_HELP, is_model_name
from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.options.checks import MOST_DRAWN, MOST_ROWS, SEEDS, a_name, between, one_of
from qlora_kit.options.option import Options, at_home, option

BASE = "base"
"""What the base without an adapter is called where an adapter could be named."""


def _texts(value: str | tuple[str, ...]) -> str | None:
    return None if value and all(value) else "texts that are not empty"


def _directories(value: str | tuple[str, ...]) -> str | None:
    check = a_name("DIR or NAME=DIR")
    for one in each(value) or ("",):
        try:
            said = check(one) or check(_named(one)[1])
        except ValueError as error:
            said = str(error)
        if said:
            return said
    return None


def each(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The values of an option that may be given more than once."""
    return (value,) if isinstance(value, str) else value or ()


@dataclass(frozen=True)
class AdaptersConfig(Options):
    """The adapters on the base, by name."""

    title: typing.ClassVar[str] = "adapters"

    adapter: str | tuple[str, ...] | None = option(
        None,
        "directory of an adapter, and the name it goes by; give it again for another one on the "
        "same base (without a name: the last part of the directory)",
        check=_directories,
        repeated=True,
        metavar="[NAME=]DIR",
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    merge_in_memory: int | None = option(
        None,
        "merge the one adapter into a copy of the linears that it adapts, in so many bits beside "
        "the base, and say how far its answers are from the adapter's: 16 is close and fast, 8 and "
        "4 take less memory and are another model",
        check=one_of(4, 8, 16),
        shown_default="not merged",
    )

    @functools.cached_property
    def named(self) -> Mapping[str, str]:
        """The directory of each adapter by its name, in the order in which they were given."""
        return dict(_called(*_named(one)) for one in each(self.adapter))

    def chosen(self, use: str | None) -> str | None:
        """The adapter that answers where nothing else is said: `use`, or the only one.

        None is the base. Errors: `ConfigError` for a name that no adapter has, and where there are
        several and no name.
        """
        names = ", ".join(self.named)
        if use in self.named:
            return use
        if use == BASE:
            return None
        if use is not None:
            raise ConfigError(
                f"use {excerpt(use)}: no adapter has this name",
                f"name one of {names}, or {BASE}" if names else "give it as --adapter NAME=DIR",
            )
        if len(self.named) > 1:
            raise ConfigError(
                f"{len(self.named)} adapters are given, and nothing says which one answers",
                f"give --use with one of {names}, or {BASE}",
            )
        return next(iter(self.named), None)

    def _conflicts(self) -> typing.Iterator[str]:
        given, found = [_named(one) for one in each(self.adapter)], dict[str, str]()
        if self.allow_other_base and not given:
            yield "allow_other_base goes with adapter, which is not given"
        if self.merge_in_memory is not None and len(given) != 1:
            yield f"merge_in_memory merges one adapter, and {len(given) or 'none'} are given"
        for name, directory in given:
            shown = excerpt(directory if name is None else f"{name}={directory}")
            called, _ = _called(name, directory)
            if called == BASE:
                yield f"adapter {shown}: give it another name, for {BASE} is the base alone"
            elif not is_model_name(called):
                yield f"adapter {shown}: give it as NAME=DIR, the name {ADAPTER_NAMES}"
            elif called in found:
                yield f"adapter {shown} is called {called}, as {excerpt(found[called])} is"
            found.setdefault(called, directory)


def _named(given: str) -> tuple[str | None, str]:
    """The name and the directory of `NAME=DIR`; no name where a directory is called so."""
    name, equals, directory = given.partition("=")
    if not equals or os.path.isdir(at_home(given)):
        return None, at_home(given)
    return name, at_home(directory)


def _called(name: str | None, directory: str) -> tuple[str, str]:
    """The name that an adapter goes by, and its directory."""
    # Of `.` and of `runs/x/` the last part is a name too.
    return os.path.basename(os.path.abspath(directory)) if name is None else name, directory


@dataclass(frozen=True)
class SamplingConfig(Options):
    """How tokens are drawn, and where an answer ends."""

    title: typing.ClassVar[str] = "generation"

    max_new_tokens: int = option(128, "stop after this many tokens", check=between(1, MOST_DRAWN))
    stop: str | tuple[str, ...] | None = option(
        None,
        "end an answer before this text; give it again for another",
        check=_texts,
        repeated=True,
        metavar="TEXT",
    )
    temperature: float = option(
        0.0, "0: always the likeliest token", check=between(0, 100, tiny=1e-6)
    )
    top_p: float = option(
        1.0,
        "draw from the likeliest tokens that make up this share",
        check=between(0, 1, open_low=True, tiny=1e-6),
    )
    top_k: int = option(
        0,
        "draw from this many of the likeliest tokens",
        check=between(0, 10**6),
        shown_default="0: from all",
    )
    repetition_penalty: float = option(
        1.0,
        "divide the logits of tokens that were there, where they are positive, by this (else "
        "multiply)",
        check=between(0.01, 100),
    )
    seed: int = option(42, "of the drawing", check=SEEDS)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return each(self.stop)


@dataclass(frozen=True)
class GenerateConfig(Options):
    """What to generate from."""

    title: typing.ClassVar[str] = "prompts"

    prompt: str | None = option(
        None,
        "the text to go on from; -, or nothing where text is piped in: from standard input, "
        "without its last line end",
        metavar="TEXT|-",
    )
    prompts: str | None = option(
        None,
        ".jsonl, .json or .csv file of rows with a prompt, and with an adapter where they name one "
        "(null: the base), or .txt with one prompt a line; answers are printed as JSON lines, each "
        "beside its row",
        check=a_name(),
        path=True,
        metavar="FILE",
    )
    use: str | None = option(
        None,
        f"of several adapters the one that answers, or {BASE}: none of them",
        check=a_name("the name of an adapter"),
        metavar="NAME",
        shown_default="the only one",
    )
    batch_size: int = option(8, "rows of --prompts at a time", check=between(1, MOST_ROWS))
    chat: bool = option(False, "put each prompt into the model's chat template")

    def _conflicts(self) -> typing.Iterator[str]:
        if self.prompt is not None and self.prompts is not None:
            yield f"prompt is given beside prompts {self.prompts}: name one of them"


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """What is measured, and what is shown of it."""

    title: typing.ClassVar[str] = "evaluation"

    exact_match: bool = option(
        True,
        "answer every prompt greedily, and count the answers that equal the completion; of a row "
        "of messages, its last trained turn",
    )
    generate: int = option(
        0, "show this many answers beside the expected ones", check=between(0, 10**6)
    )
    max_new_tokens: int = option(128, "longest answer in tokens", check=between(1, MOST_DRAWN))
    batch_size: int = option(
        8, "rows at a time", aliases=("per_device_eval_batch_size",), check=between(1, MOST_ROWS)
    )
    seed: int = option(42, "of the share that --eval_fraction draws, as in finetune", check=SEEDS)
    json: bool = option(
        False, "print JSON and nothing else: one object, or a list of them for several adapters"
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.generate and not self.exact_match:
            yield f"generate {self.generate} shows answers, and exact_match is off: name one"

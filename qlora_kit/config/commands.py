"""The options that only one of the other commands has: generate, evaluate, show-data, plan."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from qlora_kit.config.data import DEFAULT_LENGTH
from qlora_kit.config.limits import MOST_DATA, MOST_DRAWN, MOST_ROWS, MOST_TOKENS, SEEDS
from qlora_kit.config.lora import OTHER_BASE_HELP
from qlora_kit.options.checks import a_name, a_size, also, between
from qlora_kit.options.option import Options, option


def _stops(value: str | tuple[str, ...]) -> str | None:
    return None if value and all(value) else "texts that are not empty"


@dataclass(frozen=True)
class GenerateConfig(Options):
    """What to generate from, and how tokens are drawn."""

    title: typing.ClassVar[str] = "generation"

    adapter: str | None = option(
        None, "directory of an adapter", check=a_name(), path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    prompt: str | None = option(
        None,
        "the text to go on from; -, or nothing where text is piped in: from standard input, "
        "without its last line end",
        metavar="TEXT|-",
    )
    prompts: str | None = option(
        None,
        ".jsonl, .json or .csv file of rows with a prompt, or .txt with one a line; answers are "
        "printed as JSON lines, each beside its row",
        check=a_name(),
        path=True,
        metavar="FILE",
    )
    batch_size: int = option(8, "rows of --prompts at a time", check=between(1, MOST_ROWS))
    max_new_tokens: int = option(128, "stop after this many tokens", check=between(1, MOST_DRAWN))
    stop: str | tuple[str, ...] | None = option(
        None,
        "end an answer before this text; give it again for another",
        check=_stops,
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
    chat: bool = option(False, "put each prompt into the model's chat template")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    def _conflicts(self) -> typing.Iterator[str]:
        if self.prompt is not None and self.prompts is not None:
            yield f"prompt is given beside prompts {self.prompts}: name one of them"


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """What to evaluate, and what is shown of it."""

    title: typing.ClassVar[str] = "evaluation"

    adapter: str | None = option(
        None, "directory of an adapter", check=a_name(), path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
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
    json: bool = option(False, "print one JSON object and nothing else")

    def _conflicts(self) -> typing.Iterator[str]:
        if self.generate and not self.exact_match:
            yield f"generate {self.generate} shows answers, and exact_match is off: name one"


@dataclass(frozen=True)
class ShowConfig(Options):
    """What is shown of the data."""

    title: typing.ClassVar[str] = "what is shown"

    rows: int = option(3, "show this many rows, token by token", check=between(0, 10**4))
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
    quantization_error: bool = option(
        False,
        "also read the weights, which have to be here, and say how far each linear is from itself "
        "in 4 or 8 bits, the worst first",
    )
    json: bool = option(False, "print one JSON object and nothing else")

    def _conflicts(self) -> typing.Iterator[str]:
        if self.rows is not None and self.tokens is not None:
            yield f"rows {self.rows} is given beside tokens {self.tokens}: name one of them"

"""A request to the engine, and the ticket that it gets: its tokens so far, and how it ended."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qlora_kit.base.decoder import CACHE
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.generation.sampling import Drawn, Sampling
from qlora_kit.lora.switch import Active

if TYPE_CHECKING:
    from transformers import PreTrainedModel

End = Literal["end token", "length", "dropped", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is answered."""

    ids: Sequence[int]
    max_new_tokens: int
    eos_ids: Collection[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """Its name in the bank; None is the base alone."""


class Ticket:
    """A request that was taken: its tokens so far, and how it ended.

    `end` is None while it runs. `error` is a `NumericError` where its logits were not finite, or
    what was raised where memory ended.
    """

    def __init__(self, request: Request, active: Active | None) -> None:
        self.request, self.tokens = request, list[int]()
        self.end: End | None = None
        self.error: Exception | None = None
        self.active = active
        self.drawn = Drawn(request.sampling, request.ids, request.max_new_tokens)
        self._ends = frozenset(request.eos_ids)

    def take(self, token: int, is_finite: bool) -> Iterator[int | None]:
        """What a step tells of this request: its token, and None where it has ended."""
        if not is_finite:
            self.leave("error", not_finite("of a request", len(self.tokens) + 1))
        elif token in self._ends:
            self.leave("end token")
        else:
            self.tokens.append(token)
            yield token
            if len(self.tokens) == self.request.max_new_tokens:
                self.leave("length")
        if self.end is not None:
            yield None

    def leave(self, end: End, error: Exception | None = None) -> None:
        """End, and let go of the adapter; the first end is the one that stays."""
        if self.end is None:
            self.end, self.error, self.active = end, error, None


def check_cache(model: PreTrainedModel) -> None:
    """Refuse a model that decodes with states of its own. Errors: `ConfigError`."""
    parameters = inspect.signature(model.forward).parameters
    # A wrapper hands on whatever it is given. What is nothing but states has no positions.
    is_wrapper = any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
    has_keys = "position_ids" in parameters or not model._is_stateful
    if not (is_wrapper or (CACHE in parameters and has_keys)):
        raise no_cache(model)


def no_cache(model: PreTrainedModel) -> ConfigError:
    """That a model gives no cache of the kind that rows are decoded with."""
    return ConfigError(
        f"no text can be generated with {model.config.model_type} models: they keep no keys "
        "and values in a cache, which rows are decoded with here",
        "generate with transformers; training and export work",
    )


def check_token(model: PreTrainedModel, pad_id: int) -> None:
    """Refuse padding with what is no token. Errors: `ConfigError`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= pad_id < vocabulary:
        raise ConfigError(
            f"the padding token {pad_id} is not one of the model's {vocabulary}",
            "give any of the model's tokens: padding is masked",
        )


def check_request(model: PreTrainedModel, request: Request, what: str) -> None:
    """Refuse a request that the model cannot answer; `what` its prompt is called. `ConfigError`."""
    prompt, most = request.ids, request.max_new_tokens
    vocabulary = model.get_input_embeddings().weight.shape[0]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if most < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {most}", "raise it")
    if len(prompt) == 0:
        raise ConfigError(
            f"{what} is empty, without even a token that begins a text",
            "give at least one token, such as the tokenizer's BOS or EOS",
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < vocabulary)
        raise ConfigError(
            f"{what} has the token {wrong}, but the model has {vocabulary} tokens",
            "use the tokenizer of this model",
        )
    if len(prompt) + most > context:
        room = context - len(prompt)
        raise ConfigError(
            f"{what} has {len(prompt)} tokens; with max_new_tokens {most} that is beyond the "
            f"model's context of {context}",
            f"give at most {room} as --max_new_tokens" if room > 0 else "shorten the prompt",
        )


def not_finite(whose: str, number: int) -> NumericError:
    """That the logits of a row are not finite at its new token of that number."""
    return NumericError(
        f"the logits {whose} are not finite at new token {number}",
        "check the adapter and the base, or use another --dtype",
    )

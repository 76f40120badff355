"""The bodies of requests, with their limits.

Fields have the names, types and defaults of the OpenAI API, and `top_k` and `repetition_penalty`
beside them. What the API knows and this server does not do (several answers, log-probabilities,
tools ...) is refused unless its value asks for nothing; a name that is unknown here is refused as
the API does, for a misspelt `temperature` would otherwise be forgotten without a word. Fields that
change no answer, such as `user`, are taken.

Source: OpenAI's API reference, "Create chat completion" and "Create completion".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_kit.errors import excerpt
from qlora_kit.options.checks import MOST_TOKENS
from qlora_kit.serving.errors import ApiError, invalid

MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_MESSAGES = 512
MOST_PARTS = 10_000
"""Parts of a message's content, and calls of a message."""
LONGEST_PATH = 4096
LARGEST_SEED = 2**63 - 1

WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
"""Fields of the API that change no answer here, whatever their value."""

NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""Fields of the API that this server does not do, and the values that ask for nothing of it."""


OF_ANSWERS = ("refusal", "annotations")
"""Fields of an answer that its client sends back with it as a message of the chat."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


Kind = TypeVar("Kind", bound=_Body)


class StreamOptions(_Body):
    """What a stream has beside its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


Item = TypeVar("Item")
Listed: TypeAlias = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is read up to its first fault: a body may hold faults by the hundred thousand."""
Ids: TypeAlias = Annotated[Listed[int], Field(max_length=MOST_TOKENS)]

Stops: TypeAlias = (
    Annotated[str, Field(max_length=LONGEST_STOP)]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
        Field(max_length=MOST_STOPS),
    ]
)


class Asked(_Body):
    """What chats and completions have in common; `Sampling` knows the ranges of its own fields."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    usual_tokens: ClassVar[int | None] = None
    """the limit of an answer where none is asked for; None: the server's"""
    prompt_field: ClassVar[str]
    """the name of the field that has the prompt"""

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(one for one in given if one)

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer that is asked for."""
        return self.max_tokens

    @property
    def most_field(self) -> str:
        """The name of the field that says so."""
        return "max_tokens"

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[Listed[TextPart], Field(max_length=MOST_PARTS)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[Listed[dict[str, Any]], Field(max_length=MOST_PARTS)] | None = None
    reasoning_content: str | None = None


class ChatRequest(Asked):
    """The body of a chat completion."""

    messages: Annotated[Listed[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    prompt_field: ClassVar[str] = "messages"

    @property
    def most_tokens(self) -> int | None:  # noqa: D102
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_field(self) -> str:  # noqa: D102
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionRequest(Asked):
    """The body of a completion: `prompt` is a text, its tokens, or a list of one of these."""

    prompt: str | Ids | Annotated[Listed[str | Ids], Field(min_length=1, max_length=1)]

    usual_tokens: ClassVar[int | None] = 16
    prompt_field: ClassVar[str] = "prompt"

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]


class AdapterRequest(_Body):
    """The body that adds an adapter: a directory on the server's machine, and its name."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    path: Annotated[str, Field(min_length=1, max_length=LONGEST_PATH)]


def read(kind: type[Kind], body: bytes) -> Kind:
    """A request out of its bytes. Errors: `ApiError`."""
    try:
        made = kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api(error) from None
    if isinstance(made, Asked):
        _check_together(made)
    for name, value in (made.model_extra or {}).items():
        _check_extra(name, value, kind)
    for number, message in enumerate(getattr(made, "messages", ())):
        for name, value in (message.model_extra or {}).items():
            if value not in (None, "", [], {}) and name not in OF_ANSWERS:
                raise _unknown(f"messages.{number}.{name}", name, Message.model_fields)
    return made


def _check_together(asked: Asked) -> None:
    """Refuse a field that another one makes meaningless. Errors: `ApiError`."""
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options goes with stream, which is not asked for", "stream_options")
    if asked.max_tokens is not None and asked.most_field != "max_tokens":
        raise invalid(f"max_tokens is given beside {asked.most_field}: send one", "max_tokens")


def _check_extra(name: str, value: Any, kind: type[BaseModel]) -> None:
    if name in WITHOUT_EFFECT or value is None:
        return
    if name not in NOTHING:
        raise _unknown(name, name, [*kind.model_fields, *NOTHING, *WITHOUT_EFFECT])
    good = NOTHING[name]
    # True is no 1 here, nor False a 0.
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in good):
        allowed = f"leave it out{f' or send {good[0]!r}' if good else ''}"
        raise invalid(f"{name} is not supported by this server: {allowed}", name, "unsupported")


_TYPE = re.compile(r"(constrained-)?(str|int|float|bool)$|.*\[")


def _unknown(place: str, name: str, known: Iterable[str]) -> ApiError:
    near = difflib.get_close_matches(name[:60], known, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    message = f"unrecognized request argument {excerpt(name)!r}{hint}"
    return invalid(message, excerpt(place), "unknown_parameter")


def _as_api(error: ValidationError) -> ApiError:
    """One thing that is wrong with a body, by its place; a value is not repeated."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of what a field may be, the kind that was meant is the one that was read furthest.
    first = max(found, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        return invalid(f"the body is no JSON: {excerpt(first['msg'], 200)}", code="invalid_json")
    # A union names the type that was tried in the place.
    place = [str(part) for part in first["loc"] if not _TYPE.match(str(part))]
    path = excerpt(".".join(place[:5]), 120)
    missing = first["type"] == "missing"
    message = f"{path or 'the body'}: {excerpt(first['msg'], 200)}"
    return invalid(message, path or None, "missing_parameter" if missing else "invalid_value")

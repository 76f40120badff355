"""The `openai` package against the server: what it lists, answers, streams and raises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from serving_parts.adapters import NEW_TOKENS
from serving_parts.server import KEY

Answers = Mapping[tuple[str, str], list[str]]
"""What `generate` answers, by form (chat or text) and model."""


def try_client(
    port: int, models: list[str], prompts: list[str], answers: Answers
) -> dict[str, Any]:
    """Each thing that was tried, and whether it was as it must be."""
    import openai

    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    other = openai.OpenAI(base_url=url, api_key="another-key", max_retries=0)
    limits = {"max_tokens": NEW_TOKENS, "temperature": 0}
    held: dict[str, bool] = {}

    def chat(model: str, prompt: str, **more: Any) -> Any:
        messages = [{"role": "user", "content": prompt}]
        return client.chat.completions.create(model=model, messages=messages, **limits, **more)

    def streamed(chunks: Any) -> str:
        chunks = list(chunks)
        held["a stream has its usage last"] = chunks[-1].usage.completion_tokens > 0
        held["a stream says why it ends"] = any(
            choice.finish_reason for chunk in chunks for choice in chunk.choices
        )
        return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)

    def refused(name: str, kind: type[Exception], call: Callable[[], Any]) -> None:
        try:
            call()
        except kind as error:
            held[name] = bool(getattr(error, "body", None))
        except Exception as error:
            held[f"{name}: {type(error).__name__}"] = False
        else:
            held[name] = False

    held["models"] = [model.id for model in client.models.list()] == models
    held["one model"] = client.models.retrieve(models[-1]).id == models[-1]
    for model in models:
        expected = answers["chat", model]
        said = [chat(model, prompt) for prompt in prompts]
        texts = [one.choices[0].message.content for one in said]
        held[f"chat of {model} is generate's"] = texts == expected
        held["usage adds up"] = all(
            one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
            for one in said
        )
        pieces = chat(model, prompts[0], stream=True, stream_options={"include_usage": True})
        held[f"streamed chat of {model} is generate's"] = streamed(pieces) == expected[0]
        done = client.completions.create(model=model, prompt=prompts[0], **limits)
        held[f"completion of {model} is generate's"] = (
            done.choices[0].text == answers["text", model][0]
        )
        pieces = client.completions.create(model=model, prompt=prompts[0], stream=True, **limits)
        text = "".join(one.text for piece in pieces for one in piece.choices)
        held[f"streamed completion of {model} is generate's"] = text == answers["text", model][0]
    text = answers["chat", models[-1]][0]
    stop = text[len(text) // 2 :][:3]
    held["a stop string ends an answer before it"] = (
        chat(models[-1], prompts[0], stop=[stop]).choices[0].message.content
        == text[: text.index(stop)]
    )
    cut = client.completions.create(model=models[-1], prompt=prompts[0], max_tokens=1)
    held["length is the reason at one token"] = cut.choices[0].finish_reason == "length"
    drawn = [chat(models[-1], prompts[0], seed=3, top_p=0.9) for _ in range(2)]
    held["a seed draws the same again"] = (
        len({one.choices[0].message.content for one in drawn}) == 1
    )
    refused("an unknown model: NotFoundError", openai.NotFoundError, lambda: chat("none", "x"))
    refused("a wrong key: AuthenticationError", openai.AuthenticationError, other.models.list)
    wrong = {"logit_bias": {"5": 1}}
    refused(
        "an unsupported field: BadRequestError",
        openai.BadRequestError,
        lambda: chat(models[0], "x", **wrong),
    )
    refused(
        "a long prompt: BadRequestError",
        openai.BadRequestError,
        lambda: chat(models[0], "word " * 5000),
    )
    held["the asynchronous client"] = asyncio.run(_asynchronous(url, models, prompts[0], answers))
    return held


async def _asynchronous(url: str, models: list[str], prompt: str, answers: Answers) -> bool:
    """All models asked at once by one asynchronous client."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        said = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                )
                for model in models
            )
        )
    texts = [one.choices[0].message.content for one in said]
    return texts == [answers["chat", model][0] for model in models]

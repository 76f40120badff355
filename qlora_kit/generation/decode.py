"""Decode with a KV cache, batched and streamed.

Prompts of different lengths share a batch by padding on the left: the mask hides the padding and
`position_ids` count from each row's own first token, so a row gets what it would get alone; where
convolutions or recurrences would read the padding, prompts of one length alone share a batch. After
the prompt, each step feeds one token a row; the keys and values of earlier ones are in the model's
own transformers cache, and the head computes the last position only.

How a token is drawn from its logits is `sampling.py`'s part. An answer depends on its prompt and
the seed, not on the rows beside it. It ends at an end token, at a stop string, or after so many
tokens; what stop strings see is the text that the answer adds to its prompt's.

The loop is our own, and not transformers' `generate`, because it is an iterator: a caller takes
tokens as they come, and stops by taking no more. `generate` hands tokens to a callback, which makes
an iterator only with a second thread. On the CPU both gave the same tokens, one prompt and eight of
different lengths, at the same speed within 7 %.

Left out: beams, speculative decoding, models without attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.answers import turn_ends
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.generation.group import Group, together
from qlora_kit.generation.sampling import Sampling
from qlora_kit.generation.text import added_text, stop_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    ended: Callable[[int], bool] | None = None,
    **sampling: Any,
) -> Iterator[list[int | None]]:
    """At each step the token that each row has drawn, None for rows that have ended.

    A row ends when it draws one of `eos_ids`, which is not part of the answer, or after
    `max_new_tokens`, or where `ended`, asked of each row after each step, says so. `sampling` names
    fields of `Sampling`; without any, the likeliest token is taken. The model is in evaluation mode
    while the iterator is open, and back in its own mode (module by module) once it is used up or
    closed; no state of the model and no global random state changes.

    Raises `ConfigError`, before anything is computed, for a number out of its range, an empty
    prompt, a token that the model does not have, or a prompt that together with `max_new_tokens`
    exceeds the model's context; `NumericError` where logits are not finite.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}", "raise it")
    drawn = Sampling(**sampling)
    _check_prompts(model, prompts, pad_id, max_new_tokens)
    return _decode(model, prompts, max_new_tokens, frozenset(eos_ids), pad_id, drawn, ended)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    eos_ids: Collection[int] | None = None,
    batch_size: int = 8,
    **sampling: Any,
) -> Iterator[str]:
    """The answer to each prompt in turn, without special tokens; `batch_size` are made together.

    It ends before the first of `stops`. `eos_ids` is `end_ids` where it is not given; `sampling`
    and errors are as in `generate_ids`, before anything is computed.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}", "give at least 1")
    ends = end_ids(model, tokenizer) if eos_ids is None else eos_ids
    # What stands in the padding is masked: any token that the model has will do.
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    _check_prompts(model, prompts, pad_id, max_new_tokens)

    def texts(batch: Sequence[Sequence[int]]) -> list[str]:
        rows: list[list[int]] = [[] for _ in batch]

        def text(row: int) -> str:
            return added_text(tokenizer, rows[row], batch[row])

        steps = generate_ids(
            model,
            batch,
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            pad_id=pad_id,
            ended=(lambda row: stop_at(text(row), stops) is not None) if stops else None,
            **sampling,
        )
        for step in steps:
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        whole = [text(row) for row in range(len(rows))]
        return [one[: stop_at(one, stops)] for one in whole]

    batches = (prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size))
    return (text for batch in batches for text in texts(batch))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: what ends a turn of the tokenizer's chat template, and the
    EOS of the tokenizer, the config and the generation config.

    A chat model's end of turn often stands in the last one only, a base's in the template only.
    """
    ends = set(turn_ends(tokenizer))
    for owner in (tokenizer, model.config, getattr(model, "generation_config", None)):
        named = getattr(owner, "eos_token_id", None)
        if named is not None:
            ends.update([named] if isinstance(named, int) else named)
    return frozenset(ends)


@torch.no_grad()  # not inference_mode: a cast that a module caches here must serve training later
def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    sampling: Sampling,
    ended: Callable[[int], bool] | None,
) -> Iterator[list[int | None]]:
    if not prompts:
        return
    groups = [Group(model, rows, prompts, pad_id) for rows in together(model, prompts)]
    order = torch.tensor([row for group in groups for row in group.rows])
    places = order.argsort().to(model.device)
    draw = sampling.drawer(prompts, max_new_tokens)
    live = [True] * len(prompts)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for step in range(max_new_tokens):
            logits = torch.cat([group.logits() for group in groups])  # (B, V)
            if len(groups) > 1:
                logits = logits[places]
            drawn, finite = draw(logits), logits.amax(-1).isfinite()
            # One transfer a step for both, and the only one.
            tokens, good = torch.stack((drawn, finite.long())).tolist()
            for row, alive in enumerate(live):
                if alive and not good[row]:
                    raise NumericError(
                        f"the logits of row {row} are not finite at new token {step + 1}",
                        "check the adapter and the base, or use another --dtype",
                    )
            live = [
                alive and token not in eos_ids for alive, token in zip(live, tokens, strict=True)
            ]
            if not any(live):
                return
            yield [token if alive else None for token, alive in zip(tokens, live, strict=True)]
            if ended is not None:
                live = [alive and not ended(row) for row, alive in enumerate(live)]
                if not any(live):
                    return
            # Rows that have ended go on with what they draw, so that a row keeps its place and no
            # token goes up to the device.
            for group in groups:
                group.feed(drawn)
    finally:
        for module, training in modes.items():
            module.training = training


def _check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int
) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if not 0 <= pad_id < vocabulary:
        raise ConfigError(
            f"the padding token {pad_id} is not one of the model's {vocabulary}",
            "give any of the model's tokens: padding is masked",
        )
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(
                f"prompt {row} is empty, without even a token that begins a text",
                "give at least one token, such as the tokenizer's BOS or EOS",
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ConfigError(
                f"prompt {row} has the token {wrong}, but the model has {vocabulary} tokens",
                "use the tokenizer of this model",
            )
        if len(prompt) + max_new_tokens > context:
            room = context - len(prompt)
            raise ConfigError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} "
                f"that is beyond the model's context of {context}",
                f"give at most {room} as --max_new_tokens" if room > 0 else "shorten the prompt",
            )

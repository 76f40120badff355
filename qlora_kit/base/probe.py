"""A loaded model of a family without a record, tried on random tokens before it is trained.

Training calls the decoder and computes logits by itself, in chunks (`kernels/cross_entropy.py`).
That is right where transformers' class has nothing else behind its head, counts positions as we do,
and lets no token see those after it. All three are laws of numbers, so they are looked at as
numbers, through one layer of each kind: the time of some tokens, whatever the size of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.decoder import (
    decoder_layers,
    hidden_states,
    in_mode,
    layer_kind,
    logits_of,
    only_layers,
    takes,
)
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.device.target import has_values
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.process.out_of_memory import is_out_of_memory

TOKENS = 12
MOST_LAYERS = 4
ROUNDINGS = {torch.bfloat16: 4, torch.float16: 8}
"""Steps of rounding (`torch.finfo(dtype).eps`) that two ways to the same logits may be apart,
relative to the largest: each rounds a factor, a soft cap and a matmul once. In fp32, whose sums of
thousands of terms may come in another order, it is 128."""


def check_forward(model: Any) -> None:
    """Refuse a model whose own logits are not those that training computes, or that looks ahead.

    A model of a family with a record is not tried. Errors: `ModelError`.
    """
    config = model.config
    if architecture_of(config.model_type).known:
        return
    layers = decoder_layers(model)
    first = {layer_kind(layer): number for number, layer in reversed(list(enumerate(layers)))}
    remedy = "use a model of another family"
    try:
        with (
            only_layers(model, sorted(first.values())[:MOST_LAYERS]),
            in_mode(model.modules(), training=False),
            torch.no_grad(),
        ):
            problem = _problem(model)
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # transformers raises what its own code happens to raise.
        said = str(error).strip().splitlines()
        problem = f"cannot be run on {TOKENS} tokens: {said[0][:200] if said else error!r}"
        if computed_in(model) is not torch.float32:
            remedy = f"give --dtype fp32, or {remedy}"
    if problem:
        raise ModelError(f"model_type {config.model_type!r} {problem}", remedy)


def check_packs(model: Any) -> None:
    """Refuse packs for a loaded model that does not keep their rows apart by `position_ids`.

    A model of a family with a record is not tried. Errors: `ConfigError`.
    """
    config, weight = model.config, model.get_input_embeddings().weight
    if architecture_of(config.model_type).known or not has_values(weight):
        return
    try:
        with in_mode(model.modules(), training=False), torch.no_grad():
            apart = isolates_packs(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # transformers raises what its own code happens to raise; it does not take packs then.
        apart = False
    if not apart:
        raise ConfigError(
            f"packing puts rows beside each other that model_type {config.model_type!r} does not "
            "keep apart: the second of two rows gives something else than alone",
            "leave --packing out; --group_by_length also saves padding",
        )


def isolates_packs(model: Any) -> bool:
    """Whether rows that lie behind each other in one sequence do not see each other.

    Each begins at position 0 again; the second one of two has to give what it gives alone.
    """
    first, second = TOKENS // 2, TOKENS
    positions = torch.cat((torch.arange(first), torch.arange(second)))
    ids = _ids(model, first + second)
    with torch.no_grad():
        packed = hidden_states(model, ids, positions.to(ids.device)[None])[:, first:]
        alone = hidden_states(model, ids[:, first:], positions.to(ids.device)[None, first:])
    return _agree(model, packed, alone)


def _problem(model: Any) -> str | None:
    """What is wrong with a model, in words that follow its name."""
    ids, half = _ids(model, TOKENS), TOKENS // 2
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    hidden = _hidden(model, ids)
    width = hidden.shape[-1]
    if (taken := getattr(model.get_output_embeddings(), "in_features", width)) != width:
        return (
            f"has more between its decoder and its logits than a head, a factor and a soft cap: "
            f"its decoder gives {width} numbers a token, and its head takes {taken}"
        )
    theirs, ours = model(input_ids=ids, **options).logits, logits_of(model, hidden)
    other = ids.clone()
    other[:, half:] = (ids[:, half:] + 1) % model.get_input_embeddings().weight.shape[0]
    if not _agree(model, logits_of(model, _hidden(model, other))[:, :half], ours[:, :half]):
        return "lets tokens see those after them, so that it has nothing to predict"
    if ours.shape != theirs.shape or not _agree(model, ours, theirs):
        return (
            "has more between its decoder and its logits than a head, a factor and a soft cap, or "
            "counts positions in a way of its own"
        )
    with in_mode(model.modules(), training=True):
        hidden = _hidden(model, ids)
    if not _agree(model, logits_of(model, hidden), ours):
        return "gives other logits in training than in evaluation, though nothing is dropped"
    return None


def _ids(model: Any, count: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    drawn = torch.randint(weight.shape[0], (1, count), generator=torch.Generator().manual_seed(0))
    return drawn.to(model.device)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """What the decoder gives the head for one row (1, T) of tokens: (1, T, h)."""
    return hidden_states(model, ids, torch.arange(ids.shape[1], device=ids.device)[None])


def _agree(model: Any, ours: Tensor, theirs: Tensor) -> bool:
    dtype = computed_in(model)
    tolerance = ROUNDINGS.get(dtype, 128) * torch.finfo(dtype).eps
    # Not `>`: NaN is no agreement.
    agreed = (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.abs().max()
    # A plan has no numbers to compare; the run does it.
    return not has_values(agreed) or bool(agreed)

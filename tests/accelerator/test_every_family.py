"""Every family on a device: a step, a loss and tokens, with nothing mixed and nothing read.

Each family is trained in 4 or 8 bits, every second one with some linears left in 16. The options
take turns, so that each pair of them is tried on some family; `benchmarks/accelerator.py` tries all
of them on all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from accelerator import (
    Copied,
    Seen,
    accelerator,
    in_order,
    of_batch,
    saved,
    small_batch,
)
from families import TRAITS

from qlora_kit.device.target import Capability
from qlora_kit.generation.decode import generate_ids
from qlora_kit.training.loop import train_step
from qlora_kit.training.loss import evaluate

FOUND_OUT = ("bloom", "cohere2", "falcon", "falcon_h1", "gpt_neox", "lfm2", "mamba2", "opt", "phi")
"""Families without a record, each with something that the others have not."""
KEEP_NO_ROWS_APART = {"bloom", "falcon", "falcon_h1", "lfm2", "mamba2", "opt"}
KEEP_NO_ROWS_APART |= {"granite4", "granite4_nope"}
"""Those that are refused packs."""
DECODE_NOT = {"mamba2"}
"""Those without attention."""
PROMPTS = [[1, 5, 6], [1, 7, 8, 9]]
SAMPLING = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}
SLOW = {"gemma3n", "gemma4", "falcon_h1"}
"""Those whose code makes thousands of small tensors."""
OPTIONS: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "half": (False, True),
    "recompute": ("none", "selective", "full"),
    "packed": (False, True),
    "dropout": (0.0, 0.1),
    "dtype": ("bf16", "fp16", "fp32"),
    "card": ((7, 5), (8, 6), (9, 0)),
    "fused": (True, False),
    "targets": ("all-linear", "auto"),
}
QUERIES = r".*\.(q_proj|qkv_proj)"
"""What stays in 16 bits where `half` of a model does."""


class Case(NamedTuple):
    """A family and what it is trained with."""

    family: str
    bits: int
    half: bool
    recompute: str
    packed: bool
    dropout: float
    dtype: str
    card: Capability
    fused: bool
    targets: str

    @property
    def name(self) -> str:
        return "-".join(str(one).replace(" ", "") for one in self)


def cases() -> Iterator[Case]:
    draw = random.Random(1)
    for number, family in enumerate((*TRAITS, *FOUND_OUT)):
        chosen = {name: draw.choice(values) for name, values in OPTIONS.items()}
        chosen |= {"bits": (4, 8)[number // 2 % 2], "half": number % 2 == 0}
        if family in FOUND_OUT:
            chosen |= {"bits": (4, 8, 16)[number % 3], "half": False}
        if family in SLOW:
            chosen |= {"recompute": "none", "targets": "auto"}
        chosen["packed"] &= family not in KEEP_NO_ROWS_APART
        yield Case(family=family, **chosen)


def test_each_pair_of_options_is_tried() -> None:
    tried = [one._asdict() for one in cases()]
    for (left, lefts), (right, rights) in itertools.combinations(OPTIONS.items(), 2):
        pairs = {(one[left], one[right]) for one in tried}
        assert pairs >= set(itertools.product(lefts, rights)), (left, right)


def directory(case: Case) -> Any:
    """A checkpoint of the family; of one layer where all layers are alike."""
    traits = TRAITS.get(case.family, {"layer_types": ()})
    differs = {"layer_types", "no_rope_layers", "num_hidden_layers"} & traits.keys()
    return saved(case.family) if differs else saved(case.family, num_hidden_layers=1)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_a_family_mixes_no_devices_and_waits_for_none(case: Case) -> None:
    real = small_batch(case.packed)
    with accelerator(case.card) as card:
        model = card.adapted(
            directory(case),
            bits=case.bits,
            skip_modules=QUERIES if case.half else None,
            dtype=case.dtype,
            recompute=case.recompute,
            packed=case.packed,
            dropout=case.dropout,
            targets=case.targets,
            fused=case.fused,
        )
        optimizer, given = card.optimizer(model), card.on_host(real)
        # The library's masks ask positions whether rows are packed.
        asks = case.packed and case.family in FOUND_OUT
        with card.watch(may_read=asks) as seen:
            loss, norm = train_step(model, [given], optimizer, step=1, max_grad_norm=1.0)
        assert seen.reads == [()] * asks, seen.places
        assert loss.device == norm.device == model.device
        states = [one for state in optimizer.state.values() for one in state.values()]
        assert {one.device for one in states} == {card.device}
        assert in_order(without(seen, case.family)) == of_batch(real), seen.places
        assert seen.copied_out == []

        with card.watch(may_read=True) as seen:
            evaluate(model, [given])
        assert in_order(without(seen, case.family)) == of_batch(real), seen.places
        assert seen.reads == [*[()] * asks, (1,)], seen.places

        if case.half and case.family not in DECODE_NOT:
            how = SAMPLING if case.bits == 8 else {}
            drawn = generate_ids(model, PROMPTS, max_new_tokens=3, eos_ids=[], pad_id=0, **how)
            with card.watch(may_read=True):
                assert next(drawn) == [1, 1]  # what every value is
            with card.watch(may_read=True) as seen:
                next(drawn)
            assert without(seen, case.family) == [], seen.places
            assert seen.reads == [(2, len(PROMPTS))], seen.places


def without(seen: Seen, family: str) -> list[Copied]:
    """What went up, without what transformers' own code copies in each step of a family (5.23).

    Falcon divides its layer's attention by a number that it makes a tensor of each time, Gemma 3n
    takes its share of sparse activations as one.
    """
    number = {"falcon": Copied((1,), torch.int64), "gemma3n": Copied((), torch.float32)}
    return [one for one in seen.copied_in if one != number.get(family)]

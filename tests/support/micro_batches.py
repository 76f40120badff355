"""Ragged rows of random tokens, and the micro-batches of steps over them."""

from __future__ import annotations

import random
from typing import Any

from families import VOCABULARY

from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded


def ragged_rows(count: int, seed: int = 0) -> list[Encoded]:
    """Rows of 5 to 40 tokens with prompts of different lengths that are not trained on."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        ids = [1, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(4, 40)))]
        start = draw.randrange(1, len(ids) - 1)
        rows.append(Encoded(ids, [-100] * start + ids[start:]))
    return rows


def micro_batches(count: int, rows_a_step: int = 4, seed: int = 0) -> list[list[Any]]:
    """`count` steps of `rows_a_step` rows in one micro-batch each."""
    rows = ragged_rows(count * rows_a_step, seed)
    parts = [rows[i : i + rows_a_step] for i in range(0, len(rows), rows_a_step)]
    return [[collate(part, 0)] for part in parts]


def trained(model: Any) -> dict[str, Any]:
    """The trained parameters, detached copies by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

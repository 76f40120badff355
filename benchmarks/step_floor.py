"""The floor of a step: its products by frozen weights alone.

The seven linears of every layer and the head, forward and by the input. Operands are random: a card
whose power is limited multiplies constants faster than numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peers import step_dtype
from torch import Tensor


def products_floor(config: Mapping[str, Any], tokens: int, device: str) -> Callable[[str], float]:
    """A function of a level: the seconds of the products of a step of so many tokens.

    `config` is a config.json of Llama's form. Full recompute makes the products of a layer's
    forward again, but for the last.
    """
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv, wide = size * config.get("num_key_value_heads", heads), size * heads
    shapes = [(hidden, wide), (wide, hidden)] + [(hidden, kv)] * 2
    shapes += [(hidden, ffn)] * 2 + [(ffn, hidden)]
    made = {shape: _drawn(shape[::-1], device) for shape in {*shapes}}
    head = _drawn((config["vocab_size"], hidden), device)
    inputs = {size: _drawn((tokens, size), device) for size in {hidden, kv, wide, ffn}}
    layers = shapes * config["num_hidden_layers"]

    def floor(level: str) -> float:
        _wait(device)
        began = time.perf_counter()
        again = shapes[:-1] * config["num_hidden_layers"] if level == "full" else []
        for shape in layers + again:
            F.linear(inputs[shape[0]], made[shape])
        logits = F.linear(inputs[hidden], head)
        logits @ head
        for shape in layers:
            inputs[shape[1]] @ made[shape]
        _wait(device)
        return time.perf_counter() - began

    return floor


def _drawn(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=step_dtype(device))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

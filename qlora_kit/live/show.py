"""What is seen in a notebook: one picture a call, which moves where the work takes a while.

Each function does the real thing (loads the base, runs a step, switches adapters), shows what it
found in one output of the cell, and gives the numbers back. `TrainingChart` is handed to
`finetune(progress=...)`. Outside a notebook nothing is shown and the numbers are the same.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.live.chart import Output
from qlora_kit.live.step import counted_intervals, random_batch
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import Sizes
from qlora_kit.pictures import loading_figure, step_figure, switching_figure, update_figure
from qlora_kit.plan.plan import Planner

RANKS = (1, 2, 4, 8, 16, 32)
EVERY_S = 0.15
"""Seconds between two pictures of what moves: a notebook draws no faster."""
ROUNDS = 200


def show_update(update: Tensor, ranks: Sequence[int] = RANKS) -> dict[int, float]:
    """How much of a weight's `update` (out, in) each rank leaves out, as a share of its norm.

    The best fit of rank r is that of its r largest singular values (Eckart and Young, 1936).
    """
    singular = torch.linalg.svdvals(update.detach().double())
    left = singular.square().flip(0).cumsum(0).flip(0)  # of values from each place on
    fitting = [r for r in ranks if r < len(singular)]
    errors = {r: float((left[r] / left[0]).sqrt()) for r in fitting}
    Output().show(update_figure(singular.tolist(), errors, tuple(update.shape)))
    return errors


def show_loading(model: str = "tiny", bits: Sequence[int] = (16, 8, 4)) -> dict[int, int]:
    """Load a base in each number of bits, bars growing as its tensors arrive; bytes of each."""
    held: dict[int, Sizes] = {one: {} for one in bits}
    output, shown_s = Output(), 0.0

    def arrived(sizes: Sizes, component: str, tensors: Iterable[Tensor]) -> None:
        nonlocal shown_s
        sizes[component] = sizes.get(component, 0) + sum(tensor.nbytes for tensor in tensors)
        if time.monotonic() - shown_s > EVERY_S:
            output.show(loading_figure(held))
            shown_s = time.monotonic()

    for one, sizes in held.items():
        read_weights(
            open_base(BaseConfig(model, bits=one)),
            lambda component, tensors, sizes=sizes: arrived(sizes, component, tensors),  # type: ignore[misc]
        )
    # In 16 bits nothing is quantized: of its weights the linears are what the others quantize.
    other = min((sizes["weights_other"] for one, sizes in held.items() if one < 16), default=0)
    if other and 16 in held:
        whole = sum(held[16].values())
        held[16] = {"weights_quantized": whole - other, "weights_other": other}
    output.show(loading_figure(held))
    return {one: sum(sizes.values()) for one, sizes in held.items()}


@dataclass(frozen=True)
class StepMemory:
    """The most bytes of tensors in a training step, as planned and as counted in a real one."""

    planned: int
    measured: int


def show_step(
    model: str = "tiny",
    bits: int = 4,
    rows: int = 8,
    length: int = 128,
    gradient_checkpointing: str = "none",
) -> StepMemory:
    """Memory over a step of `rows` x `length` tokens by component: planned, then measured."""
    base = BaseConfig(model, bits=bits)
    training = TrainingConfig(gradient_checkpointing=gradient_checkpointing, optim="adamw")
    lora = LoRAConfig()
    planner = Planner(base, lora, training)
    levels = [gradient_checkpointing] * len(planner.run.layers)
    batches = planner.run.micro_batches(rows, length, length, 1)
    planned = list(planner.run.passes(batches, levels))
    planned += planner.run.updates_after(planned[-1].end)
    adapted: Any = inject_lora(read_weights(open_base(base)), lora)
    batch = random_batch(adapted.config.vocab_size, rows, length)
    measured = counted_intervals(adapted, training, batch)
    both = [[vars_of(one) for one in places] for places in (planned, measured)]
    Output().show(step_figure(*both))
    peaks = (max(one.peak for one in places) for places in (planned, measured))
    return StepMemory(*peaks)


def vars_of(interval: Any) -> dict[str, Any]:
    """Of an interval what a picture has of it."""
    return {"phase": interval.phase, "module": interval.module, "at_peak": interval.at_peak}


def show_switching(bank: AdapterBank, ids: Tensor) -> dict[str, float]:
    """Seconds of a switch between the adapters of a bank, and of one forward pass of `ids`.

    Medians: of `ROUNDS` switches, and of five passes. The bank is left as it was.
    """
    before, names = bank.active, itertools.cycle([*bank.names, None])
    switches, passes = [], []
    try:
        for _ in range(ROUNDS):
            name = next(names)
            began = time.perf_counter()
            bank.use(name)
            switches.append(time.perf_counter() - began)
        with torch.no_grad():
            for _ in range(5):
                began = time.perf_counter()
                bank.base.model(input_ids=ids.to(bank.base.device))
                passes.append(time.perf_counter() - began)
    finally:
        bank.use(before)
    found = {
        "a switch": statistics.median(switches),
        f"a forward pass of {ids.numel()} tokens": statistics.median(passes),
    }
    Output().show(switching_figure(found))
    return found

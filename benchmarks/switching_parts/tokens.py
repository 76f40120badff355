"""Milliseconds of a prompt and of a decoding step of 8 rows: one adapter, merged, mixed; PEFT's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plan_grid import SHAPE
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.base.decoder import CACHE
from qlora_kit.base.linear import base_matmul
from qlora_kit.base.packed_matmul import Copies, copying_into
from qlora_kit.base.quantize import decoding
from qlora_kit.generation.group import Group
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import lora_layers, switch_of
from qlora_kit.lora.merged import merge
from qlora_kit.lora.mixed import Mixed
from qlora_kit.lora.switch import Active
from switching_parts.made import RANK, make_base, peft_adapters, save_adapters

ROWS, LENGTH, STEPS = 8, 64, 8
ONE, MIXED = "one adapter for all", "mixed"
GUIDED, BEST = "PEFT as its users have it", "PEFT without its defaults"


@dataclass
class Side:
    """What computes a prompt, then one step after another; `prepare` is not timed."""

    prepare: Callable[[], object]
    prompt: Callable[[], object]
    step: Callable[[], object]
    prompts_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """A prompt and some steps, timed; the first step, which may lay weights out, is not."""
        self.prepare()
        began = time.perf_counter()
        self.prompt()
        self.prompts_s.append(time.perf_counter() - began)
        self.step()
        taken = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self.step()
            taken.append(time.perf_counter() - began)
        self.steps_s.append(statistics.median(taken))


@torch.no_grad()
def measure(scratch: Path, rounds: int, layers: int) -> dict[str, Any]:
    """All sides in turns, after one round that is not counted."""
    base = make_base({**SHAPE, "num_hidden_layers": layers}, scratch / "shape", bits=4)
    names, folder = [f"task{number}" for number in range(ROWS)], scratch / "adapters"
    save_adapters(base, folder, names, RANK, "all-linear")
    bank = AdapterBank(base)
    for name in names:
        bank.add(name, folder / name)
    mixed, one = bank.rows(names), bank.rows(names[:1])
    assert isinstance(mixed, Mixed)
    assert one is not None
    copies: Copies = {}
    active: dict[str, Active | None] = {"base": None, ONE: one, MIXED: mixed}
    active |= {f"merged in {bits} bits": merge(base, one, bits) for bits in (4, 16)}
    prompts = torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH))  # type: ignore[call-overload]
    sides = {name: _ours(base, what, prompts, copies) for name, what in active.items()}
    for label, as_guided in ((GUIDED, True), (BEST, False)):
        model = peft_adapters(scratch / "shape", folder, names, as_guided=as_guided)
        sides[f"{label}: {ONE}"] = _peft(model, prompts, None, as_guided=as_guided)
        sides[f"{label}: {MIXED}"] = _peft(model, prompts, names, as_guided=as_guided)
    for number in range(rounds + 1):
        order = list(sides.values())
        first = number % len(order)
        for side in order[first:] + order[:first]:
            side.turn()
        print(f"round {number} of {rounds}", flush=True)
    return {
        "rows": ROWS,
        "prompt_tokens": LENGTH,
        "rank": RANK,
        "linears": len(lora_layers(base.model)),
        "sides": {name: _described(side) for name, side in sides.items()},
        "ratios": _ratios(sides),
        "products_ms": _products_ms(base, copies),
        "bytes": _bytes(one, mixed, folder / names[0], model),
    }


def _ours(base: Base, active: Active | None, prompts: Tensor, copies: Copies) -> Side:
    """Our model as an engine decodes: packed weights are read as they are where that is faster."""
    switch, held = switch_of(base.model), list[Group]()

    def prepare() -> None:
        switch.active = active

    def prompt() -> None:
        held[:] = [Group(base.model, prompts.tolist(), 0)]
        held[0].logits(copies)

    def step() -> None:
        held[0].feed(torch.full((ROWS,), 5))
        held[0].logits(copies)

    return Side(prepare, prompt, step)


def _peft(model: Any, prompts: Tensor, names: Sequence[str] | None, *, as_guided: bool) -> Side:
    """PEFT's model as `generate` calls it; of `adapter_names` one for each row.

    `generate` asks for the last position's logits by a number: of several rows that is a slice, for
    which torch copies the head's weight. By an index it does not.
    """
    held: dict[str, Any] = {}
    by_row = {} if names is None else {"adapter_names": list(names)}

    def prepare() -> None:
        model.set_adapter("task0")

    def run(ids: Tensor, cache: Any) -> None:
        before = 0 if cache is None else cache.get_seq_length()
        output = model(
            input_ids=ids,
            attention_mask=torch.ones(ROWS, before + ids.shape[1], dtype=torch.long),
            use_cache=True,
            logits_to_keep=1 if as_guided else torch.tensor([ids.shape[1] - 1]),
            **by_row,
            **{CACHE: cache},
        )
        held["cache"] = getattr(output, CACHE)

    def step() -> None:
        run(torch.full((ROWS, 1), 5), held["cache"])

    return Side(prepare, lambda: run(prompts, None), step)


def _described(side: Side) -> dict[str, float]:
    """Medians over the rounds, the first left out."""
    return {
        "prompt_ms": 1e3 * statistics.median(side.prompts_s[1:]),
        "step_ms": 1e3 * statistics.median(side.steps_s[1:]),
    }


def _ratios(sides: dict[str, Side]) -> dict[str, dict[str, float]]:
    """Times of others over that of our mixed batch: medians of the rounds."""
    ours, found = sides[MIXED], {}
    for name, side in sides.items():
        if side is ours:
            continue
        prompts = zip(side.prompts_s[1:], ours.prompts_s[1:], strict=True)
        steps = zip(side.steps_s[1:], ours.steps_s[1:], strict=True)
        found[f"{name} / {MIXED}"] = {
            "prompt": statistics.median(other / own for other, own in prompts),
            "step": statistics.median(other / own for other, own in steps),
        }
    return found


def _products_ms(base: Base, copies: Copies) -> dict[str, float]:
    """The linears' own products alone, best of 5: the floor of a prompt and of a step."""
    layers = [layer.base_layer for layer in lora_layers(base.model).values()]

    def best(tokens: int, what: Callable[[Any, Tensor], object]) -> float:
        given = [torch.randn(ROWS, tokens, layer.in_features).bfloat16() for layer in layers]
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            for layer, x in zip(layers, given, strict=True):
                what(layer, x)
            taken.append(time.perf_counter() - began)
        return 1e3 * min(taken)

    with decoding(), copying_into(copies):
        step = best(1, base_matmul)
    return {
        "step": step,
        "step, decoded first": best(1, base_matmul),
        "decoding the weights": best(
            1, lambda layer, x: layer.dequantize_into_workspace(torch.bfloat16)
        ),
        "prompt": best(LENGTH, base_matmul),
    }


def _bytes(one: Active, mixed: Mixed, files: Path, model: Any) -> dict[str, int]:
    """Of an adapter: in its file, in the bank, in PEFT's model; a mix of 8 and its rows."""
    theirs = [p for name, p in model.named_parameters() if ".task0." in name]
    return {
        "file": (files / "adapter_model.safetensors").stat().st_size,
        "bank": int(one.nbytes),  # type: ignore[attr-defined]
        "peft_bf16": sum(p.numel() * p.element_size() for p in theirs),
        "peft_as_users_have_it": sum(p.numel() * 4 for p in theirs),
        "mix_of_8": mixed.stacks.held_bytes,
        "rows_of_8": mixed.stacks.room.nbytes,
    }

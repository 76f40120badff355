"""Recompute by budget: what `auto` takes of a budget, and how fast it steps, at many budgets.

Budgets go from a little below what `full` takes to a little above what `none` takes. For each the
plan chooses the levels; then one real model steps with them, its bytes counted tensor by tensor in
one step and its seconds taken in others. Budgets take turns in an order that is drawn anew each
round, so that other work on the machine falls on all of them. Writes a JSON and a picture.

    python benchmarks/budget.py                     # the 1b shape, 4 bits, 1 x 512, 20 budgets
    python benchmarks/budget.py --shape tiny --batch 8 --length 256 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers.ours import Peer
from pictures import draw_budgets
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from stepping import TINY, batches, wait

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import OVERHEADS
from qlora_kit.memory.profiler import count_step
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner
from qlora_kit.training.layer_forward import set_recompute

BELOW, ABOVE = 0.97, 1.01
"""The first budget, of what `full` takes, and the last, of what `none` takes."""


def planner_of(directory: Path, given: argparse.Namespace) -> Planner:
    """Plans of the model that is measured."""
    base = BaseConfig(str(directory), bits=given.bits, dtype="bf16", device=given.device)
    lora = LoRAConfig(r=given.rank, alpha=2 * given.rank, target_modules="q_proj,v_proj")
    training = TrainingConfig(optim="adamw", batch_size=given.batch, gradient_accumulation_steps=1)
    return Planner(base, lora, training)


def described(plan: MemoryPlan) -> dict[str, Any]:
    """What a plan says of its budget."""
    return {
        "budget_bytes": plan.budget_bytes,
        "planned_bytes": plan.peak_bytes,
        "fits": plan.fits,
        "recompute": plan.recompute,
        "recomputed": plan.recomputed,
    }


def counted_bytes(peer: Peer, ids: torch.Tensor, device: str) -> int:
    """The most bytes at once in one real step."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        peer.step(ids)
        wait(device)
        return torch.cuda.max_memory_allocated()
    with count_step(peer.model, peer.optimizer) as counter:
        peer.step(ids)
    return counter.peak


def measure(peer: Peer, plans: list[MemoryPlan], given: Any) -> list[dict[str, Any]]:
    """Counted bytes and tokens a second of every mix of levels that a plan has."""
    mixes = list(dict.fromkeys(plan.levels for plan in plans if plan.fits))
    data = iter(
        batches(given.directory, given.batch, given.length, len(mixes) * (given.rounds + 1))
    )
    counted, seconds = {}, {mix: list[float]() for mix in mixes}
    peer.step(batches(given.directory, given.batch, given.length, 1)[0])  # makes the states
    for mix in mixes:
        set_recompute(peer.model, mix)
        counted[mix] = counted_bytes(peer, next(data), given.device)
    drawn = random.Random(0)
    for _ in range(given.rounds):
        for mix in drawn.sample(mixes, len(mixes)):
            set_recompute(peer.model, mix)
            ids = next(data)
            began = time.perf_counter()
            peer.step(ids)
            wait(given.device)
            seconds[mix].append(time.perf_counter() - began)
    tokens, found = given.batch * given.length, []
    for plan in plans:
        one = described(plan)
        if plan.fits:
            taken = statistics.median(seconds[plan.levels])
            one |= {"counted_bytes": counted[plan.levels], "step_s": taken}
            one |= {"tokens_per_s": tokens / taken}
            # What a budget has room for, without the context, which no allocator counts, and the
            # margin.
            room = OVERHEADS[plan.device].room(one["budget_bytes"])
            one |= {"room_bytes": room, "used": counted[plan.levels] / room}
        found.append(one)
    return found


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "budget")
    shapes = Path(os.environ.get("QLORA_KIT_DATA", "")) / "configs"
    shape = shapes / "tinyllama_1b_chat_v1.0.json"
    parser.add_argument("--shape", default=str(shape), help="a config.json, or tiny")
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="of a checkpoint that is there already")
    return parser.parse_args()


def main() -> None:
    given = parse()
    shape = TINY / "config.json" if given.shape == "tiny" else Path(given.shape)
    with tempfile.TemporaryDirectory() as folder:
        if given.directory is None:
            given.directory = Path(folder) / "base"
            make_checkpoint(shape, given.directory)
            copy_tokenizer(TINY, given.directory)
        planner = planner_of(given.directory, given)
        largest = BatchShape(given.batch, given.length, given.length)
        all_of, none = (planner.plan(largest, level) for level in ("full", "none"))
        low = BELOW * (all_of.peak_bytes + all_of.margin_bytes)
        high = ABOVE * (none.peak_bytes + none.margin_bytes)
        steps = [number / (given.budgets - 1) for number in range(given.budgets)]
        budgets = [int(low + (high - low) * step) for step in steps]
        plans = [planner.plan(largest, "auto", budget) for budget in budgets]
        peer = Peer(given.directory, given.bits, "none", given.rank, given.device)
        found = measure(peer, plans, given)
    name = "tiny" if given.shape == "tiny" else shape.stem
    setting = {"shape": name, "bits": given.bits, "batch": given.batch, "length": given.length}
    ends = {"full_bytes": all_of.peak_bytes, "none_bytes": none.peak_bytes}
    result = {**setting, **ends, "budgets": found}
    path = write_result(given, result)
    for one in found:
        print(one)
    title = f"{name}, {given.bits} bits, {given.batch} x {given.length} tokens"
    draw_budgets(path.with_suffix(".png"), f"Recompute by budget: {title}", found)
    print(path)


if __name__ == "__main__":
    main()

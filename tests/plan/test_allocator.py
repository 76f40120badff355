"""Laws of what `auto` takes of a card: the allocator's segments, too, stay below it."""

from __future__ import annotations

import json
import random

import pytest
from benchmark import BENCHMARKS
from caching_allocator import (
    LARGE_SEGMENT,
    ROUND,
    SMALL,
    SMALL_SEGMENT,
    CachingAllocator,
    FullError,
)
from recorded_run import RecordedRun, recording, reserved

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import OVERHEADS
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIB = 2**20


def test_sizes_come_out_of_segments_as_torch_takes_them():
    """Rounded to 512 bytes; 2 MiB for what is small, 20 MiB up to 10, then multiples of 2 MiB."""
    for size, taken, segment in (
        (1, ROUND, SMALL_SEGMENT),
        (SMALL, SMALL, SMALL_SEGMENT),
        (SMALL + 1, SMALL + ROUND, LARGE_SEGMENT),
        (10 * MIB - ROUND, 10 * MIB - ROUND, LARGE_SEGMENT),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (21 * MIB + 1, 22 * MIB, 22 * MIB),  # what is over is less than 1 MiB: not split off
    ):
        allocator = CachingAllocator()
        assert allocator.malloc(size).size == taken
        assert allocator.reserved == segment
    grown = CachingAllocator(expandable=True)
    assert grown.malloc(21 * MIB + 1).size == 21 * MIB + ROUND
    assert grown.reserved == 2 * LARGE_SEGMENT
    grown.malloc(19 * MIB - ROUND)
    assert grown.reserved == 2 * LARGE_SEGMENT


def test_a_hole_that_a_segment_leaves_is_none_in_an_expandable_one():
    """Two blocks side by side are freed; as large as both fits into them in one of the two."""
    for expandable, expected in ((False, 200 * MIB), (True, 100 * MIB)):
        allocator = CachingAllocator(expandable=expandable)
        for block in [allocator.malloc(50 * MIB) for _ in range(2)]:
            allocator.free(block)
        allocator.malloc(100 * MIB)
        assert allocator.reserved == expected


@pytest.mark.parametrize("expandable", [False, True])
def test_blocks_never_overlap_and_nothing_is_lost(expandable):
    """Against a plain account of addresses, at random, with a device that is often full."""
    draw = random.Random(5)
    allocator, taken, full = CachingAllocator(256 * MIB, expandable=expandable), [], 0
    for _ in range(3000):
        if taken and draw.random() < 0.5:
            allocator.free(taken.pop(draw.randrange(len(taken))))
            continue
        size = int(2 ** draw.uniform(4, 25.5))
        try:
            block = allocator.malloc(size)
        except FullError:
            full += 1
            continue
        assert size <= block.size
        end = block.address + block.size
        assert all(end <= one.address or one.address + one.size <= block.address for one in taken)
        taken.append(block)
        assert sum(one.size for one in taken) == allocator.allocated <= allocator.reserved
        assert allocator.reserved <= allocator.capacity
    assert full
    for block in taken:
        allocator.free(block)
    assert allocator.allocated == 0
    allocator.malloc(200 * MIB)  # everything else was given back for it
    assert allocator.reserved <= allocator.capacity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("allocator") / "config.json"
    path.write_text(json.dumps(SHAPE))
    lora, training = LoRAConfig(target_modules="all-linear"), TrainingConfig(optim="adamw")
    with recording():
        return RecordedRun(Planner(BaseConfig(str(path), bits=4), lora, training, "cuda"))


def test_what_is_replayed_is_what_is_planned(run):
    """Beside two workspaces, which no plan counts: to the 512 bytes of each tensor."""
    shape = BatchShape(1, 2048, 2048)
    plan = run.planner.plan(shape, "selective")
    allocator = CachingAllocator()
    reserved(run.loading, [run.step(shape, plan)], allocator)
    tensors = plan.peak_bytes - OVERHEADS["cuda"].fixed
    assert tensors <= allocator.peak_allocated <= 1.01 * tensors + 20 * MIB


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_auto_reserves_no_more_than_the_card_has(run, share):
    """Cards between what `full` and what `none` takes; shorter rows come before the longest."""
    planner, shape = run.planner, BatchShape(1, 4096, 4096)
    needs = [
        plan.peak_bytes + plan.margin_bytes
        for plan in (planner.plan(shape, level) for level in ("full", "none"))
    ]
    card = int(needs[0] + share * (needs[1] - needs[0])) + 2
    plan = planner.plan(shape, "auto", card)
    assert plan.fits
    shorter, longest = (run.step(BatchShape(1, length, length), plan) for length in (1552, 4096))
    room = card - OVERHEADS["cuda"].fixed
    for expandable in (True, False):
        order = [longest, shorter, longest]  # the preflight has the longest
        allocator = CachingAllocator(room, expandable=expandable)
        assert reserved(run.loading, order, allocator) <= room


def test_what_was_replayed_of_real_models_stays_below_their_cards():
    """The result of `benchmarks/allocator.py`."""
    settings = json.loads((BENCHMARKS / "results" / "allocator.json").read_text())["settings"]
    assert len(settings) == 40
    assert {one["card"] for one in settings} == {"8GB", "12GB", "16GB", "24GB"}
    for one in settings:
        assert one["fits"]
        assert one["holds_expandable"]
        assert one["reserved_expandable"] <= one["room_bytes"]

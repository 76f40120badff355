"""Laws of the plan of a run that replays its layers from the host: counted, extended, told of."""

from __future__ import annotations

import pytest
import torch
from counted_steps import counted_step
from families import save_checkpoint, token_ids

from qlora_kit.base.config_only import open_shape
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.transfer import PIECE
from qlora_kit.memory.counter import HOST
from qlora_kit.plan.fake_model import FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.work import moved_bytes

LAYERS, HIDDEN = 6, 64
ON_HOST = Placement(activations_on_host=True)
LORA = LoRAConfig(r=4, target_modules="all-linear")
MIX = ("none", "full", "full", "selective", "selective", "none")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("offloaded") / "base"
    changes = {"num_hidden_layers": LAYERS, "intermediate_size": 96}
    save_checkpoint(directory, "llama3", torch.bfloat16, **changes)
    return BaseConfig(str(directory), bits=16, dtype="bf16", device="cpu")


def run_of(base, device, placement=ON_HOST, training=None):
    target, training = torch.device(device), training or TrainingConfig()
    shape = open_shape(base, target)
    return FakeRun(FakeModel(shape, LORA, training, target, placement=placement))


def test_an_extended_trace_is_the_whole_one(base):
    """Every interval with all its components, what is on the host among them."""
    run = run_of(base, "cuda")
    micro_batches = run.micro_batches(2, 64, 48, 3)
    for levels in (["full"] * LAYERS, ["selective"] * LAYERS, MIX):
        whole = run.trace(micro_batches, range(LAYERS), levels)
        assert list(map(sizes, run.passes(micro_batches, levels))) == list(map(sizes, whole))


def sizes(interval):
    """All that is compared of an interval; what it has nothing of is left out."""
    kept = [interval.start, interval.end, interval.at_peak, interval.largest]
    found = [{name: size for name, size in one.items() if size} for one in kept]
    return interval.phase, interval.module, interval.peak, found


@pytest.mark.parametrize(
    ("levels", "dtype"),
    [(["full"] * LAYERS, "bf16"), (["selective"] * LAYERS, "fp32"), (MIX, "fp32")],
)
def test_what_is_planned_is_what_is_counted(base, levels, dtype):
    """Interval by interval, on a device whose memory is the host's; gradients in either dtype."""
    training = TrainingConfig(optim="adamw", gradient_accumulation_steps=2, gradient_dtype=dtype)
    batches = []
    for seed in range(2):
        ids = token_ids(2, 64, seed).tolist()
        batches.append(collate([Encoded(row, row) for row in ids], 0))
    found = counted_step(base, LORA, training, levels, batches, batches[0], ON_HOST)
    run = run_of(base, "cpu", training=training)
    planned = run.passes(run.micro_batches(2, 64, 63, 2), levels)
    # Of the real step the last micro-batch: the one that is planned.
    last = [one for one in found if one.phase != "step"][-len(planned) :]
    assert list(map(sizes, planned)) == list(map(sizes, last))
    updates = run.updates_after(planned[-1].end)
    assert [one.peak for one in updates] == [one.peak for one in found if one.phase == "step"]


def test_what_leaves_a_card_is_on_the_host_and_said_to_be_moved(base):
    """A row of every layer but the last, in pieces; two are back at once."""
    rows, length = 2, 128
    row = 2 * rows * length * HIDDEN
    plain, moved = run_of(base, "cuda", Placement()), run_of(base, "cuda")
    before, after = (
        run.passes(run.micro_batches(rows, length, 4, 1), ["full"] * LAYERS)
        for run in (plain, moved)
    )
    at_head = [
        next(one for one in passes if one.module == "head and loss") for passes in (before, after)
    ]
    assert at_head[0].start["activations"] - at_head[1].start["activations"] == (LAYERS - 1) * row
    assert at_head[0].peak - at_head[1].peak == (LAYERS - 1) * row
    assert at_head[1].start[HOST] == (LAYERS - 1) * PIECE
    layers = [one for one in after if one.phase == "backward" and "layers" in one.module]
    assert [one.largest[HOST] for one in layers] == [
        (LAYERS - 1 - max(0, place - 1)) * PIECE for place in range(LAYERS)
    ]
    # Out and back.
    assert sum(moved_bytes(one.work) for one in after) == 2 * (LAYERS - 1) * row

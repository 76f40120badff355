"""Laws of the plan of a streamed base: what is counted, byte for byte; a card has two layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from counted_steps import counted_step
from families import save_checkpoint, token_ids

from qlora_kit.base import cache as base_cache
from qlora_kit.base import layer_store
from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.kept_base import listed, read_manifest
from qlora_kit.base.layer_store import streamed_names
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.base.resident import streamed_of
from qlora_kit.base.stream import SLOTS
from qlora_kit.commands.argv import parse
from qlora_kit.commands.plan import main as plan_command
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import with_room
from qlora_kit.memory.counter import COMPONENTS, most_of_each
from qlora_kit.plan.extrapolate import cut, layers_of
from qlora_kit.plan.plan import BatchShape, Planner

STREAMED = Placement(base_on_host=True)
LORA = LoRAConfig(r=8, target_modules="all-linear")


def save(directory, family, layers=6):
    save_checkpoint(
        directory, family, torch.bfloat16, num_hidden_layers=layers, intermediate_size=192
    )
    return str(directory)


def batch_of(rows, length):
    ids = [token_ids(1, length, seed=number)[0].tolist() for number in range(rows)]
    return collate([Encoded(row, row) for row in ids], 0)


def training_of(level, **changes):
    settings = {"optim": "adamw", "gradient_checkpointing": level, "batch_size": 2, **changes}
    return TrainingConfig(gradient_accumulation_steps=2, offload_base=True, **settings)


@pytest.mark.parametrize(
    ("family", "bits", "level"),
    [("llama3", 4, "full"), ("gemma2", 8, "selective"), ("qwen3", 16, "none")],
)
def test_planned_equals_counted(tmp_path, family, bits, level):
    """On the CPU, where slots and the host's blocks are of one memory."""
    base = BaseConfig(save(tmp_path, family), bits=bits, dtype="bf16", device="cpu")
    training = training_of(level)
    batches = [batch_of(2, 64) for _ in range(2)]
    counted = counted_step(base, LORA, training, level, batches, batch_of(1, 16), STREAMED)
    plan = Planner(base, LORA, training).plan(BatchShape(2, 64, 64))
    assert plan.placement == STREAMED
    for phase in ("forward", "backward", "step"):
        peak = max(one.peak for one in counted if one.phase == phase)
        assert plan.phases[phase] == peak, phase
    passes = [one for one in counted if one.phase != "step"]
    found = most_of_each(passes) | {"optimizer": passes[0].start["optimizer"]}
    assert {name: plan.bytes[name] for name in COMPONENTS} == {n: found[n] for n in COMPONENTS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of one test, in which small bases are kept too."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache" / "bases"))
    for name in ("SMALLEST", "JUST_NOW", "LEFT_FREE"):
        monkeypatch.setattr(base_cache, name, 0)
    return tmp_path / "cache" / "bases"


def test_what_is_read_from_files_is_planned_as_counted(tmp_path, cache, monkeypatch):
    """Where the host cannot hold the layers, there are two of them."""
    base = BaseConfig(save(tmp_path / "base", "llama3"), dtype="bf16", device="cpu")
    training, shape = training_of("full"), BatchShape(2, 64, 64)
    in_memory = Planner(base, LORA, training).plan(shape)
    monkeypatch.setattr(layer_store, "SPARE", 2**60)
    plan = Planner(base, LORA, training, host_bytes=2**40).plan(shape)
    batches = [batch_of(2, 64) for _ in range(2)]
    counted = counted_step(base, LORA, training, "full", batches, batch_of(1, 16), STREAMED)
    for phase in ("forward", "backward", "step"):
        peak = max(one.peak for one in counted if one.phase == phase)
        assert plan.phases[phase] == peak, phase
    assert plan.phases["load"] < in_memory.phases["load"]
    assert plan.placed().startswith("base in the files of the cache")


@pytest.mark.parametrize("form", [[], ["--bits", "8"], ["--head_bits", "4"], ["--no_base_cache"]])
def test_a_plan_and_a_run_stream_from_the_same_place(tmp_path, cache, monkeypatch, capsys, form):
    """To the byte that the host has free."""
    monkeypatch.setattr(layer_store, "SPARE", 2**20)
    options = ["--model", save(tmp_path / "base", "llama_bias"), "--device", "cpu", *form]
    config = parse("test", "", (BaseConfig,), options)[BaseConfig]
    read_weights(open_base(replace(config, base_cache=True)))
    (kept,) = (read_manifest(one.path) for one in listed(cache))
    names = streamed_names(kept, "model.layers.")
    size = sum(kept.tensors[name].end - kept.tensors[name].start for name in names)
    for free in (size + 2**20 - 1, size + 2**20):
        with with_room(free):
            assert plan_command([*options, "--offload_base", "true", "--json"]) == 0
            model = read_weights(open_base(config), placement=STREAMED)
        slots = len(streamed_of(decoder_layers(model)[0].mlp.up_proj).blocks) == SLOTS
        planned = json.loads(capsys.readouterr().out)
        assert planned["in_files"] == slots == (free < size + 2**20 and config.base_cache)


def plan_of(base, placement, device="cuda"):
    planner = Planner(base, LORA, training_of("full"), device)
    return planner, planner.plan(BatchShape(2, 64, 64), placement=placement)


def test_a_card_holds_two_layers_of_any_number(tmp_path):
    """The rest of the base is the host's; what else the card holds is what it held."""
    planned = []
    for layers in (4, 6):
        base = BaseConfig(save(tmp_path / str(layers), "llama3", layers), dtype="bf16")
        planner, plan = plan_of(base, STREAMED)
        resident = planner.plan(BatchShape(2, 64, 64), placement=Placement())
        planned.append(plan)
        quantized = resident.bytes["weights_quantized"]
        # A block has tensors at multiples of 256 bytes, and in these models they are small.
        assert plan.bytes["weights_quantized"] < 1.2 * 2 * quantized / layers
        assert plan.host_peak_bytes > quantized
        # Gradients wait on the host while the passes last.
        assert plan.bytes["gradients"] == 0 < resident.bytes["gradients"]
        for name in ("weights_other", "adapters", "optimizer", "loss", "workspace"):
            assert plan.bytes[name] == resident.bytes[name], name
        assert plan.phases["step"] - plan.bytes["weights"] == (
            resident.phases["step"] - resident.bytes["weights"]
        )
    # An offset of each linear stays: 4 bytes.
    few, many = (one.bytes["weights_quantized"] for one in planned)
    assert many - few == 4 * 7 * 2


def test_bytes_moved_are_told_and_extend_to_all_layers(tmp_path):
    """A pass of n layers loads n - 2 forward and n - 2 backward; a few of them are traced."""
    base = BaseConfig(save(tmp_path, "llama3", 12), dtype="bf16")
    planner, plan = plan_of(base, STREAMED)
    run = planner.run
    layers = len(run.layers)
    assert len(layers_of(cut(["full"] * layers))) == 3
    batches = run.micro_batches(2, 64, 64, 1)
    intervals = run.passes(batches, ["full"] * layers)
    moved = dict.fromkeys(("forward", "backward"), 0)
    for one in intervals:
        for work, times in one.work.items():
            if work.kind in ("to_device", "transfer"):
                moved[one.phase] += times * work.bytes
    block = (plan.bytes["weights_quantized"] - 4 * 7 * layers) // 2
    # Each gradient goes to the host as it comes; with one micro-batch none is fetched before.
    loaded, gradients = (layers - 2) * block, plan.bytes["adapters"]
    assert moved == {"forward": loaded, "backward": loaded + gradients}

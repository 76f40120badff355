"""Laws of a step's modelled time: what is counted is what the shapes say, whatever the card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from qlora_kit.commands.plan import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.cards import CARDS, Card, card_named, find_card
from qlora_kit.errors import ConfigError
from qlora_kit.kernels.cross_entropy import CHUNK_TOKENS
from qlora_kit.kernels.triton_ops import allow_triton
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.step_time import GAPS, Clock, interval_seconds
from qlora_kit.plan.work import KINDS, noted_work

# Llama-3.1-8B, less deep.
LAYERS, HIDDEN, FFN, KV, VOCABULARY, RANK = 6, 4096, 14336, 1024, 128256, 16
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
CARD = CARDS["rtx4090"]
CLOCK = Clock(CARD)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    lora = LoRAConfig(r=RANK, target_modules="all-linear")
    base = BaseConfig(str(path), bits=4, dtype="bf16")
    return Planner(base, lora, TrainingConfig(optim="adamw"), "cuda", clock=CLOCK)


def passes(planner, length, level="none", rows=1):
    run = planner.run
    batches = run.micro_batches(rows, length, length, 1)
    return run.passes(batches, [level] * len(run.layers))


def sums(intervals, what):
    found = Counter()
    for interval in intervals:
        for work, times in interval.work.items():
            found[work.kind] += times * getattr(work, what)
    return found


@pytest.mark.parametrize(("length", "level"), [(512, "none"), (2048, "full")])
def test_flops_are_those_of_the_shapes(planner, length, level):
    """Within 1 %: a step has one more or less of a row's tokens in the loss."""
    found = sums(passes(planner, length, level), "flops")
    linears = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KV + 3 * HIDDEN * FFN)
    adapters = LAYERS * RANK * (2 * (2 * HIDDEN) + 2 * (HIDDEN + KV) + 3 * (HIDDEN + FFN))
    attention = 2 * LAYERS * length**2 * HIDDEN
    # A frozen base has no gradients by weights; of an adapter there are both.
    products = 2 * length * (2 * linears + 2 * HIDDEN * VOCABULARY + 3 * adapters)
    kernels = 3.5 * attention
    if level == "full":  # but for the last product of each layer, which nothing reads
        products += 2 * length * (linears - LAYERS * HIDDEN * FFN + adapters)
        kernels += attention
    assert found["matmul"] == pytest.approx(products, rel=0.01)
    assert found["attention"] == pytest.approx(kernels, rel=0.01)


@pytest.mark.parametrize(
    ("window", "pairs"), [(None, 96**2 + 32**2), (16, 2 * 128 * 16 - 2 * 16**2)]
)
def test_rows_of_a_pack_see_themselves_alone(window, pairs):
    """Half of all pairs of a row, for attention is causal; of a window what is in it."""
    heads, width = 2, 16
    parts = [torch.randn(1, heads, 128, width) for _ in range(3)]
    starts = torch.tensor([0, 96, 128], dtype=torch.int32)
    counter = StorageCounter()
    with counter, noted_work(counter):
        counter.at("forward")
        torch.ops.qlora_kit.attend_by_kernel(*parts, starts, [96, 32], 0.25, "flash", window)
    found = sums(counter.intervals, "flops")["attention"]
    assert found == 4 * heads * width * pairs / 2


def test_dequantizing_moves_the_bytes_of_its_format(planner):
    """Packed codes, codes of scales and a 16-bit result; with scales in fp32 between, if at all."""
    found = sums(passes(planner, 512), "bytes")["dequantize"]
    weights = 2 * LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KV + 3 * HIDDEN * FFN)  # both passes
    weights -= HIDDEN**2 + 2 * HIDDEN * KV  # the first layer's input has no gradient
    least = (0.5 + 1 / 64 + 4 / (64 * 256) + 2) * weights
    scales_between = 4 * 4 / 64 * weights
    assert least * 0.999 <= found <= (least + scales_between) * 1.001


def test_chunks_that_are_not_traced_are_counted(planner):
    few, many = (sums(passes(planner, CHUNK_TOKENS * count), "flops")["matmul"] for count in (4, 8))
    assert many == pytest.approx(2 * few, rel=0.001)


def test_time_grows_with_tokens_and_recompute(planner):
    def seconds(intervals):
        return CLOCK.step(intervals, planner.run.updates, 1, 1).total_s

    by_length = [seconds(passes(planner, length)) for length in (256, 1024)]
    assert by_length == sorted(by_length)
    one, four = by_length[0], seconds(passes(planner, 256, rows=4))
    # Tokens together are never slower than one row after another.
    assert one < four < 4 * one
    by_level = [one, *(seconds(passes(planner, 256, level)) for level in ("selective", "full"))]
    assert by_level == sorted(by_level)


def test_time_is_a_sum_over_layers(planner):
    """A deep model's is that of its layers, whether each is traced or not."""
    run = planner.run
    batches = run.micro_batches(1, 512, 512, 1)
    levels = ["full"] * 2 + ["none"] * (LAYERS - 2)
    cut = run.passes(batches, levels)
    whole = run.trace(batches, range(LAYERS), levels)
    by_layer = CLOCK.layers(whole, run.names)
    assert CLOCK.layers(cut, run.names) == pytest.approx(by_layer)
    ends = [one for one in whole if one.module not in run.names]
    total = sum(by_layer) + sum(sum(interval_seconds(one, CARD).values()) for one in ends)
    assert CLOCK.step(cut, (), 1, 512).total_s == pytest.approx(total)
    alone = CLOCK.step(cut, (), 1, 512).total_s
    assert CLOCK.step(cut, (), 16, 512).total_s == pytest.approx(16 * alone)


def test_a_slow_host_leaves_gaps(planner):
    intervals = passes(planner, 128)
    slow = replace(CARD, launch_s=1e-3)
    found = Clock(slow).step(intervals, (), 1, 128)
    assert found.seconds[GAPS] > 0.5 * found.total_s
    assert found.total_s == pytest.approx(found.kernels * 1e-3)


def test_auto_takes_none_where_it_fits_and_else_the_fastest_mix(planner):
    shape = BatchShape(1, 1024, 1024)
    whole = planner.plan(shape, "none")
    assert planner.plan(shape, "auto", 10**12).recompute == "none"
    assert whole.time is not None
    full = planner.plan(shape, "full")
    takes = [one.peak_bytes + one.margin_bytes for one in (whole, full)]
    between = planner.plan(shape, "auto", sum(takes) // 2)
    assert between.fits
    assert whole.time.total_s < between.time.total_s < full.time.total_s
    assert set(whole.time.seconds) == {*KINDS, GAPS}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_each_card_has_its_figures(card: Card):
    assert card.source
    assert (7, 5) <= card.capability <= (12, 0)
    # What 16 bits are to fp32 goes from twice (GeForce, halved) to sixteen times (A100).
    assert 1.9 * card.flops_fp32 < card.flops <= 16.1 * card.flops_fp32
    # Cards of these years move a byte in the time of 40 to 400 FLOP.
    assert 40 < card.flops / card.bandwidth < 450
    assert 5 * 1024**3 < card.memory_bytes < 200 * 1024**3
    assert find_card(card.name.upper()) is card


def test_cards_go_by_the_names_that_people_and_drivers_have():
    for spelt, name in {
        "RTX 4090": "rtx4090",
        "4090": "rtx4090",
        "H100": "h100-sxm",
        "GeForce RTX 3060": "rtx3060",
        "a100": "a100-80gb",
    }.items():
        assert find_card(spelt).name == name
    for driver, memory, name in (
        ("NVIDIA GeForce RTX 4090", 24564, "rtx4090"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 3080 Ti", 12288, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16384, None),
        ("NVIDIA A10G", 23028, None),
    ):
        found = card_named(driver, memory * 1024**2)
        assert (found.name if found else None) == name, driver
    with pytest.raises(ConfigError, match="did you mean rtx4090"):
        find_card("rtx4091")


OPTIONS = ["--model", "tiny", "--max_length", "64", "--lora_r", "8", "--batch_size", "1"]


def test_the_command_says_time_and_hours(capsys):
    def said(*more):
        assert main([*OPTIONS, "--card", "rtx4090", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    found = said("--rows", "3200", "--num_train_epochs", "2")
    assert found["budget_bytes"] == CARD.memory_bytes
    assert (found["device"], found["time"]["card"]) == ("cuda", "rtx4090")
    assert found["time"]["is_estimate"]
    # 16 rows a step, and as many tokens as its rows have.
    assert found["hours"] == pytest.approx(2 * 3200 / 16 * found["time"]["step_s"] / 3600)
    by_tokens = said("--tokens", str(3200 * 64))
    assert by_tokens["hours"] == pytest.approx(found["hours"] / 2)


def test_hours_without_a_card_are_refused(capsys):
    assert main([*OPTIONS, "--device_memory", "8GB", "--rows", "1000"]) == 2
    assert "rows 1000: hours are" in capsys.readouterr().err


def test_a_card_that_is_not_known_is_refused(capsys):
    assert main([*OPTIONS, "--card", "rtx4091"]) == 2
    assert "did you mean rtx4090?" in capsys.readouterr().err
    assert main([*OPTIONS, "--card", "t4", "--device", "cpu"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_card_without_bf16_is_planned_in_fp16(capsys):
    assert main([*OPTIONS, "--card", "t4"]) == 0
    shown = capsys.readouterr().out
    assert "stay in fp16" in shown
    assert "tokens/s on t4" in shown
    assert "estimate" in shown
    assert "no units for bf16" not in shown
    assert main([*OPTIONS, "--card", "t4", "--dtype", "bf16"]) == 0
    assert "t4 has no units for bf16" in capsys.readouterr().out.replace("\n", " ")


BEFORE = {"forward": 87, "backward": 141}
"""Kernels of a layer with adapters on all linears, in torch's operations one after another."""


def of_a_layer(planner, level="none"):
    """The interval of an inner layer, by phase."""
    name = planner.run.names[2]
    return {one.phase: one for one in passes(planner, 2048, level) if one.module == name}


def kernels(interval):
    return sum(times * work.kernels for work, times in interval.work.items())


def kept(interval):
    return interval.end["activations"] - interval.start["activations"]


def test_a_layer_launches_less_than_half_of_what_torchs_operations_would(planner):
    """And keeps for backward what is promised, with Triton and without."""
    found = of_a_layer(planner)
    allow_triton(False)
    try:
        without = of_a_layer(planner)
    finally:
        allow_triton(True)
    for phase, before in BEFORE.items():
        assert kernels(found[phase]) <= before // 2
        assert kernels(found[phase]) < kernels(without[phase]) <= before
        assert found[phase].peak <= without[phase].peak
    # lora/block.py; 32 heads and seven adapters.
    numbers = 4 * HIDDEN + 2 * KV + 2 * FFN + 7 * RANK
    promised = 2048 * (2 * numbers + 4 * (2 + 32))
    assert kept(found["forward"]) == kept(without["forward"]) == pytest.approx(promised, rel=1e-3)
    twice = of_a_layer(planner, "full")
    assert kernels(twice["backward"]) < kernels(found["forward"]) + kernels(found["backward"])

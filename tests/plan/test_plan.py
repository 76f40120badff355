"""Laws of the memory plan: what it says of a run is what is counted of the run, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocations import profiled_peak
from counted_steps import counted_step
from families import save_checkpoint
from processor import processor_s

from qlora_kit.base.config_only import open_shape
from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import PLACED, TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import OVERHEADS
from qlora_kit.device.target import DTYPES, processor_with
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import COMPONENTS
from qlora_kit.memory.profiler import count_step
from qlora_kit.options.checks import MOST_ROWS
from qlora_kit.plan import fake_model
from qlora_kit.plan.extrapolate import cut, layers_of
from qlora_kit.plan.fake_model import FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.levels import choose_levels, layer_work
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.plan_memory import plan_memory
from qlora_kit.plan.suggest import Options, least_of_weights, suggest
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

LEVELS = ("none", "selective", "full")
ON_DEVICE = dict.fromkeys(
    ("tiled_mlp", "offload_embedding", "offload_activations", "offload_base"), False
)
"""One fake run a plan: for laws that hold wherever things lie."""
SHAPE = {"num_hidden_layers": 6, "intermediate_size": 192, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A random Llama of six layers, deep enough to be extended."""
    directory = tmp_path_factory.mktemp("plan") / "base"
    save_checkpoint(directory, "llama3", torch.bfloat16, **SHAPE)
    return str(directory)


def batch_of(rows, length, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 260, (rows, length), generator=drawn).tolist()
    return collate([Encoded(row, row) for row in ids], 0)


def counted(base, lora, training, levels, rows, length, micro_steps=3):
    """The intervals of a real second step, the optimizer's at its end."""
    micro_batches = [batch_of(rows, length, seed) for seed in range(micro_steps)]
    return counted_of(base, lora, training, levels, micro_batches)


def counted_of(base, lora, training, levels, micro_batches):
    """As `counted`, of given micro-batches."""
    return counted_step(base, lora, training, levels, micro_batches, batch_of(1, 16))


def sizes_of(intervals):
    most = {}
    for interval in intervals:
        for name, size in interval.largest.items():
            most[name] = max(most.get(name, 0), size)
    return most


def assert_equal(plan, intervals, rows=0):
    """Planned equals counted: each component and the peak of each phase.

    Where packs hold so many rows more than are planned, batches have an int32 more for each.
    """
    passes = [one for one in intervals if one.phase != "step"]
    peaks = {
        phase: max(one.peak for one in intervals if one.phase == phase)
        for phase in ("forward", "backward", "step")
    }
    assert {phase: plan.phases[phase] + 4 * rows for phase in peaks} == peaks
    found = sizes_of(passes) | {"optimizer": passes[0].start["optimizer"]}
    for name in COMPONENTS:
        more = 4 * rows if name == "activations" else 0
        assert plan.bytes[name] + more == found.get(name, 0), name


POINTS = [
    (4, "none", 1, 128, "auto", "adamw"),
    (4, "selective", 4, 128, "all-linear", "paged_adamw_8bit"),
    (4, "full", 1, 256, "all-linear", "adamw"),
    (8, "none", 4, 128, "all-linear", "adamw"),
    (8, "selective", 1, 256, "auto", "adamw"),
    (8, "full", 4, 128, "auto", "paged_adamw_8bit"),
    (16, "none", 1, 128, "all-linear", "paged_adamw_8bit"),
    (16, "selective", 4, 128, "auto", "adamw"),
    (16, "full", 1, 128, "auto", "adamw"),
]
"""Every pair of bits and level, and of either with what else a run may be."""


@pytest.mark.parametrize(("bits", "level", "rows", "length", "targets", "optim"), POINTS)
def test_planned_equals_counted(base_dir, bits, level, rows, length, targets, optim):
    model = "tiny" if targets == "auto" else base_dir
    base = BaseConfig(model, bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=8, target_modules=targets, dropout=0.1 if rows == 1 else 0.0)
    training = TrainingConfig(
        optim=optim, gradient_checkpointing=level, batch_size=rows, gradient_accumulation_steps=3
    )
    intervals = counted(base, lora, training, level, rows, length)
    assert_equal(plan_memory(base, lora, training, length=length), intervals)


DENSE_POINTS = [
    ("smollm3", 16, "selective", "all-linear"),  # a layer without a rotary embedding
    ("olmo3", 4, "none", "all-linear"),  # norms behind, and of all heads at once
    ("ministral3", 8, "selective", "auto"),  # queries scaled
    ("granite4", 8, "full", "all-linear"),
    ("glm4", 4, "none", "auto"),
    ("phi4_mini", 4, "selective", "all-linear"),  # a table of its long rotary embedding
    ("gemma3", 8, "full", "all-linear"),
    ("gemma4", 4, "none", "all-linear"),  # keys and values of other layers, layers' embeddings
    ("gemma4_dense", 4, "selective", "all-linear"),
]


@pytest.mark.parametrize(("family", "bits", "level", "targets"), DENSE_POINTS)
def test_planned_equals_counted_for_newer_families(tmp_path, family, bits, level, targets):
    save_checkpoint(tmp_path / "base", family, torch.bfloat16, intermediate_size=192)
    base = BaseConfig(str(tmp_path / "base"), bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=8, target_modules=targets)
    training = TrainingConfig(
        optim="adamw", gradient_checkpointing=level, batch_size=2, gradient_accumulation_steps=2
    )
    intervals = counted(base, lora, training, level, 2, 64, micro_steps=2)
    assert_equal(plan_memory(base, lora, training, length=64), intervals)


def test_a_plan_of_many_layers_that_share_keys_is_what_is_counted(tmp_path):
    """Through a few of them; gradients by what they share add up until the layer that made it."""
    changes = {"num_hidden_layers": 10, "hidden_size_per_layer_input": 32, "intermediate_size": 64}
    save_checkpoint(tmp_path / "base", "gemma4", torch.bfloat16, **changes)
    base = BaseConfig(str(tmp_path / "base"), bits=16, dtype="bf16", device="cpu")
    lora, level = LoRAConfig(r=8), "selective"
    training = TrainingConfig(
        optim="adamw", gradient_accumulation_steps=2, gradient_checkpointing=level
    )
    intervals = counted(base, lora, training, level, 1, 32, micro_steps=2)
    assert_equal(plan_memory(base, lora, training, length=32), intervals)


PACKS = [[100, 27, 1], [64, 64], [100, 20]]
"""Rows of three packs of 128 tokens, the last one padded."""


def packed_micro_batches(micro_steps=2):
    rows = [[Encoded([1] * length, [1] * length) for length in pack] for pack in PACKS]
    return [collate_packs(rows, 0) for _ in range(micro_steps)]


PACK_POINTS = [
    *(("llama3", "fp32", 4, level) for level in LEVELS),
    ("llama3", "bf16", 8, "selective"),
    ("mistral", "fp32", 16, "none"),
    ("gemma2", "bf16", 4, "full"),
]


@pytest.mark.parametrize(("family", "dtype", "bits", "level"), PACK_POINTS)
def test_planned_equals_counted_for_packs(tmp_path, family, dtype, bits, level):
    """Attention within rows, of windows and soft caps too."""
    save_checkpoint(tmp_path / "base", family, DTYPES[dtype])
    base = BaseConfig(str(tmp_path / "base"), bits=bits, dtype=dtype, device="cpu")
    lora = LoRAConfig(r=8)
    training = TrainingConfig(
        optim="adamw", batch_size=3, gradient_accumulation_steps=2, gradient_checkpointing=level
    )
    micro_batches = packed_micro_batches()
    supervised = micro_batches[0]["num_supervised"]
    assert supervised % 3 == 0  # a planned micro-batch has as many in each of its rows
    planned = Planner(base, lora, training).plan(BatchShape(3, 128, supervised // 3, True, 100))
    intervals = counted_of(base, lora, training, level, micro_batches)
    # Two rows are planned for each pack; padding is a row of its own.
    more = sum(len(batch["row_starts"]) - (2 * 3 + 1) for batch in micro_batches)
    assert_equal(planned, intervals, more)


def test_a_plan_without_data_is_not_below_any_packs(base_dir):
    """What `plan --packing` says: rows of packs may be as long as a pack, and are at least two."""
    base = BaseConfig(base_dir, bits=4, dtype="bf16", device="cpu")
    training = TrainingConfig(optim="adamw", batch_size=3, gradient_accumulation_steps=2)
    for level in LEVELS:
        changed = replace(training, gradient_checkpointing=level)
        # Without instructions for bf16 copies in fp32 grow with a pack's length, beyond these 3 %.
        with processor_with(torch.bfloat16):
            planned = plan_memory(base, LoRAConfig(), changed, length=128, packing=True)
            intervals = counted_of(base, LoRAConfig(), changed, level, packed_micro_batches())
        peak = max(one.peak for one in intervals)
        assert peak <= planned.peak_bytes <= 1.03 * peak


def test_suggestions_keep_within_what_options_may_be(base_dir):
    """Halving the batch doubles the accumulation, which has a bound."""
    training = TrainingConfig(batch_size=MOST_ROWS, gradient_checkpointing="full", **ON_DEVICE)
    options = Options(BaseConfig(base_dir), LoRAConfig(), training, 128)
    planner = Planner(options.base, options.lora, training, "cuda")
    for one in suggest(options, planner, "cuda", 2**30):
        assert one.plan.fits


@pytest.mark.parametrize(("device", "bits"), [("cpu", 16), ("cpu", 4), ("cuda", 8), ("cuda", 4)])
def test_where_weights_alone_are_too_much_no_change_is_planned(base_dir, device, bits):
    """What is taken for the least of them is below what they are with any change."""
    one_place = dict.fromkeys(PLACED if device == "cuda" else ("tiled_mlp",), True)
    training = TrainingConfig(optim="adamw", gradient_checkpointing="full", **one_place)
    base = BaseConfig(base_dir, bits=bits, dtype="bf16")
    options = Options(base, LoRAConfig(), training, 256)
    asked = []

    class Noted(Planner):
        def plans(self, shapes, *others):
            asked.extend(shape for shape, _ in shapes)
            return super().plans(shapes, *others)

    planner = Noted(base, LoRAConfig(), training, device)
    least = least_of_weights(options, planner, planner.plan(options.largest, budget_bytes=1))
    assert least > 0
    changed = replace(options, base=replace(base, bits=4, head_bits=4), length=128)
    strongest = Planner(changed.base, LoRAConfig(r=8), training, device)
    assert least <= strongest.plan(changed.largest, budget_bytes=1).bytes["weights"]
    asked.clear()
    assert suggest(options, planner, device, 1) == []
    assert set(asked) == {options.largest}


@pytest.mark.parametrize(("device", "packed"), [("cpu", True), ("cuda", False)])
def test_the_cost_of_a_plan_does_not_depend_on_batch_and_accumulation(base_dir, device, packed):
    training = TrainingConfig(gradient_checkpointing="full", **ON_DEVICE)
    planner = Planner(BaseConfig(base_dir, bits=8, dtype="bf16"), LoRAConfig(), training, device)
    peaks, seconds = [], []
    for rows, micro_steps in ((4, 2), (2**20, 2**10)):
        began = processor_s()
        shape = BatchShape(rows, 256, 256, packed)
        peaks.append(planner.plan(shape, micro_steps=micro_steps).peak_bytes)
        seconds.append(processor_s() - began)
    assert peaks[1] > 2**20 * 256 * 64 * 2  # one layer's input, in 16 bits
    assert seconds[1] < 3 * seconds[0] + 1
    with pytest.raises(ConfigError, match="tokens a step; lower --batch_size"):
        planner.plan(BatchShape(10**14, 256, 256))


def run_of(base_dir, device="cpu", **options):
    base = BaseConfig(base_dir, bits=4, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=4, **options)
    target = torch.device(device)
    return FakeRun(FakeModel(open_shape(base, target), lora, TrainingConfig(), target))


@pytest.mark.parametrize(
    ("device", "targets"), [("cuda", "all-linear"), ("cpu", r"model\.layers\.[2-5]\..*q_proj")]
)
def test_an_extended_trace_is_the_whole_one(base_dir, device, targets):
    """Every interval with all its components, at single levels and at mixes."""
    run = run_of(base_dir, device, target_modules=targets)
    micro_batches = run.micro_batches(2, 64, 48, 3)
    mixes = [[level] * 6 for level in LEVELS]
    mixes += [["full", "full", "full", "full", "selective", "none"], ["none"] * 4 + ["full"] * 2]
    for levels in mixes:
        whole = run.trace(micro_batches, range(6), levels)
        assert run.passes(micro_batches, levels) == whole


def test_auto_fills_the_budget_and_never_exceeds_it(base_dir):
    """Within 90 % of it or all that `none` takes; more memory never means more work."""
    run = run_of(base_dir)
    micro_batches = run.micro_batches(4, 128, 128, 2)
    peaks = {
        level: max(one.peak for one in run.passes(micro_batches, [level] * 6)) for level in LEVELS
    }
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    before = None
    for part in (0, 5, 10):
        budget = peaks["full"] + (peaks["none"] - peaks["full"]) * part // 10
        found = choose_levels(run, micro_batches, budget)
        assert found.peak == max(one.peak for one in run.passes(micro_batches, found.levels))
        assert 0.9 * budget <= found.peak <= budget
        work = sum(
            layer_work(layer, level, 128, run.fused)
            for layer, level in zip(run.layers, found.levels, strict=True)
        )
        assert before is None or work <= before
        before = work
    assert set(found.levels) == {"none"}
    assert set(choose_levels(run, micro_batches, None).levels) == {"none"}
    assert set(choose_levels(run, micro_batches, peaks["full"] - 1).levels) == {"full"}


def test_a_plan_sums_up(base_dir):
    training = TrainingConfig(**ON_DEVICE)
    asked = {"training": training, "length": 64, "device": "cuda"}
    plan = plan_memory(BaseConfig(base_dir), budget_bytes=10**9, **asked)
    assert sum(n for name, n in plan.at_peak.items() if name != "paged") == plan.peak_bytes
    assert plan.bytes["weights"] == plan.bytes["weights_quantized"] + plan.bytes["weights_other"]
    assert plan.fits
    assert not plan_memory(BaseConfig(base_dir), budget_bytes=10**6, **asked).fits
    assert json.loads(json.dumps(plan.as_json()))["peak_bytes"] == plan.peak_bytes


def test_no_plan_fills_a_card_to_its_brim(base_dir):
    """A margin is part of what fits, and of what auto chooses its levels for."""
    base = BaseConfig(base_dir, bits=4, dtype="bf16")
    training = TrainingConfig(batch_size=8, optim="adamw")
    training = replace(training, **dict.fromkeys(PLACED, False))
    planner, overhead = Planner(base, LoRAConfig(), training, "cuda"), OVERHEADS["cuda"]
    shape = BatchShape(8, 512, 512)
    least, most = (planner.plan(shape, level) for level in ("full", "none"))
    needs = [one.peak_bytes + one.margin_bytes for one in (least, most)]
    assert needs[0] < needs[1]
    for plan in (least, most):
        tensors = plan.peak_bytes - overhead.fixed
        assert plan.margin_bytes == overhead.reserve + int(overhead.share * tensors)
    assert overhead.share > 0 < overhead.reserve
    assert not planner.plan(shape, "full", needs[0] - 1).fits
    assert planner.plan(shape, "full", needs[0]).fits
    # What is rounded down on one side may be on the other: a byte or two.
    for budget in (needs[0] - 1, needs[0] + 2, sum(needs) // 2, needs[1] - 1, needs[1] + 2):
        plan = planner.plan(shape, "auto", budget)
        assert plan.fits == (plan.peak_bytes + plan.margin_bytes <= budget)
        assert plan.fits == (budget >= needs[0])
        assert (set(plan.levels) == {"none"}) == (budget >= needs[1])


def test_auto_takes_adamw_unless_its_states_do_not_fit(base_dir, tmp_path):
    """The plan of `auto` is that of the optimizer that it names, and says why it is that one."""
    wider = json.loads(Path(base_dir, "config.json").read_text())
    wider |= {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    wider.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(wider))
    # From 100,000 elements on a state is paged.
    base = BaseConfig(str(tmp_path / "config.json"))
    lora = LoRAConfig(r=256, target_modules=("gate_proj",))
    shape = BatchShape(1, 64, 64)
    alone = {
        name: Planner(base, lora, TrainingConfig(optim=name), "cuda").plan(shape, "full")
        for name in ("adamw", "paged_adamw_8bit")
    }
    large, small = alone["adamw"], alone["paged_adamw_8bit"]
    assert small.bytes["paged"]
    assert small.peak_bytes < large.peak_bytes
    planner = Planner(base, lora, TrainingConfig(**dict.fromkeys(PLACED, False)), "cuda")
    reasons = {"adamw": "auto: it fits", "paged_adamw_8bit": "auto: adamw does not fit"}
    needs = {name: plan.peak_bytes + plan.margin_bytes for name, plan in alone.items()}
    for budget, expected in (
        (needs[large.optim], large),
        (needs[large.optim] - 1, small),
        (None, large),  # as often as it is asked, in any order
        (needs[small.optim] - 1, small),
        (needs[large.optim], large),
    ):
        found = planner.plan(shape, "full", budget)
        assert found.optim == expected.optim
        assert (found.peak_bytes, found.bytes) == (expected.peak_bytes, expected.bytes)
        assert found.at_peak == expected.at_peak
        assert found.why_optim == (reasons[found.optim] if budget else "auto: no budget is given")
        assert found.fits == (budget is None or needs[expected.optim] <= budget)
    assert Planner(base, lora, TrainingConfig(), "cpu").plan(shape).optimizer == "adamw"


def test_a_bare_config_is_enough_and_gives_the_same(base_dir, tmp_path):
    alone = tmp_path / "config.json"
    with open(f"{base_dir}/config.json") as file:
        alone.write_text(file.read())
    lora, training = LoRAConfig(target_modules="all-linear"), TrainingConfig()
    options = {"length": 64, "device": "cuda"}
    whole = plan_memory(BaseConfig(base_dir), lora, training, **options)
    bare = plan_memory(BaseConfig(str(alone)), lora, training, **options)
    assert (bare.bytes, bare.peak_bytes) == (whole.bytes, whole.peak_bytes)
    with pytest.raises(ModelError):
        plan_memory(BaseConfig(str(tmp_path / "missing.json")))
    with pytest.raises(ConfigError, match="gate"):
        plan_memory(BaseConfig(str(alone)), LoRAConfig(target_modules="gate"))


def test_every_suggestion_is_the_plan_of_the_run_so_changed(bases):
    base = BaseConfig(str(bases / "shallow"), bits=16, dtype="bf16")
    lora = LoRAConfig(r=16, target_modules="all-linear")
    training = TrainingConfig(optim="paged_adamw_8bit", batch_size=2, gradient_accumulation_steps=2)
    options = Options(base, lora, training, 256)
    planner = Planner(base, lora, training, "cuda")
    plan = planner.plan(options.largest, "full")
    least = plan.peak_bytes + plan.margin_bytes
    found = suggest(options, planner, "cuda", least - 1)
    assert len(found) > 2
    assert found[0].change == "--batch_size 1 --gradient_accumulation_steps 4"
    for one in found:
        words = one.change.split()
        changes = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
        length = int(changes.pop("max_length", 256))
        groups = {
            "base": {name: changes.pop(name) for name in ("bits",) if name in changes},
            "lora": {
                field: changes.pop(name)
                for name, field in (("lora_r", "r"), ("target_modules", "target_modules"))
                if name in changes
            },
        }
        again = plan_memory(
            replace(base, **groups["base"]),
            replace(lora, **groups["lora"]),
            replace(training, **changes),
            length=length,
            device="cuda",
            budget_bytes=least - 1,
        )
        assert again.fits
        assert again.peak_bytes == one.plan.peak_bytes, one.change


def test_the_counter_agrees_with_the_profiler_on_a_real_step(base_dir):
    """The growth over a step, within 2 % or 1 MiB of torch's allocation events."""
    model = inject_lora(read_weights(open_base(BaseConfig(base_dir, device="cpu"))), LoRAConfig())
    training = TrainingConfig()
    prepare_model(model, training, "none")
    optimizer = make_optimizer("adamw", model.parameters(), 1e-3)
    micro_batches = [batch_of(4, 256)]
    model.train()

    def step():
        train_step(model, micro_batches, optimizer, step=1, max_grad_norm=1.0)

    step()
    with count_step(model, optimizer, micro_batches=micro_batches) as counter:
        start = counter.current
        step()
    peak = profiled_peak(step)
    assert abs(counter.peak - start - peak) <= max(0.02 * peak, 2**20)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_once_for_each_shape_takes_what_all_of_it_takes(
    base_dir, bits, device, monkeypatch
):
    def loading():
        target = torch.device(device)
        base = open_shape(BaseConfig(base_dir, bits=bits, dtype="bf16"), target)
        intervals = FakeModel(base, LoRAConfig(), TrainingConfig(), target).loading
        highest = max(intervals, key=lambda one: one.peak)
        return highest.peak, highest.at_peak, sizes_of(intervals), intervals[-1].end

    repeated = loading()
    monkeypatch.setattr(fake_model, "RepeatedQuantize", lambda counter, apart: quantize_linear)
    assert repeated == loading()


@pytest.mark.parametrize(
    ("kinds", "traced"),
    [
        ("A", 1),
        ("AAA", 3),
        ("AAAAAA", 3),
        ("LLLF" * 8, 12),
        ("LLLF" * 3, 12),
        ("LLLF" * 5 + "LL", 14),
        ("SF" * 6 + "SS", 8),
        ("MMMMMAMMMMMMAMMM", 11),
    ],
)
def test_a_repeated_pattern_is_traced_three_times(kinds, traced):
    """Whatever the pattern, the parts say of every layer which one stands for it."""
    parts = cut(kinds)
    stands = [kinds[i] for part in parts for _ in range(part.repetitions) for i in part.layers]
    assert "".join(stands) == kinds
    assert len(layers_of(parts)) == traced

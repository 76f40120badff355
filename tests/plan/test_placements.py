"""Laws of what lies on the host: which placement is taken, and which rows fit with each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from qlora_kit.commands.plan import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, PLACED, TrainingConfig
from qlora_kit.device.cards import CARDS
from qlora_kit.memory.counter import Interval
from qlora_kit.plan.choose import choose
from qlora_kit.plan.levels import WORK_OF_A_BYTE
from qlora_kit.plan.longest import STEP, longest_rows
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.step_time import Clock, interval_seconds, seconds_of
from qlora_kit.plan.suggest import Options, suggest
from qlora_kit.plan.work import TRANSFER, Work

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
}
ROW = BatchShape(1, 4096, 4096)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return BaseConfig(str(path), bits=4, dtype="bf16")


@pytest.fixture(scope="module")
def planner(config):
    return Planner(config, LoRAConfig(), TrainingConfig(optim="adamw"), "cuda")


def needs(plan):
    return plan.peak_bytes + plan.margin_bytes


def test_what_fits_on_the_device_stays_there(planner):
    """The first placement that fits is taken, and its plan says what there would be without."""
    full = planner.plan(ROW, "full", placement=ON_DEVICE)
    assert planner.plan(ROW, "full", needs(full)).placement == ON_DEVICE
    assert planner.plan(ROW, "full").placement == ON_DEVICE
    found = planner.plan(ROW, "full", needs(full) - 1)
    assert found.fits
    assert found.placement != ON_DEVICE
    assert found.peak_bytes_without == full.peak_bytes
    assert found.placed().endswith(f" the peak would be {full.peak_bytes} bytes")
    least = planner.plan(ROW, "full", 1)
    assert not least.fits
    assert least.placement == planner.placements[-1]


def test_each_placement_holds_less_than_the_one_before(planner):
    peaks = [planner.plan(ROW, "full", placement=one).peak_bytes for one in planner.placements]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]
    moved = [planner.plan(ROW, "full", placement=one).moved_bytes for one in planner.placements]
    assert moved == sorted(moved)
    assert moved[0] == 0 < moved[-1]


def test_more_is_moved_only_where_the_step_gets_faster(planner):
    """Of the placements behind the first that fits each is taken for less work, none for more."""
    least = planner.plan(ROW, "full", 1)
    plans = {
        one: replace(least, placement=one, budget_bytes=None, recomputed=0.5, optim="adamw")
        for one in planner.placements
    }
    does_not = replace(least, optim="adamw")

    def chosen(costs, fitting):
        places = planner.placements
        cost = dict(zip(places, costs, strict=True))

        def plans_of(one, name):
            fits = places.index(one) >= fitting
            return [plans[one] if fits else replace(does_not, placement=one)]

        found = choose(places, ["adamw"], plans_of, lambda plan: cost[plan.placement], True)
        return places.index(found[0].placement)

    assert chosen([5, 4, 3, 2, 1], 0) == 0  # what fits is not looked behind
    assert chosen([5, 4, 3, 2, 1], 1) == 4
    assert chosen([5, 4, 3, 3, 1], 1) == 2
    assert chosen([5, 4, 5, 3, 1], 1) == 1
    assert chosen([5, 4, 3, 2, 1], 9) == 4


def test_memory_of_the_host_is_taken_for_a_gain_that_is_worth_it(planner):
    """Of 5 % a step down; what is more than the host has does not fit, and the plan says so."""
    least = planner.plan(ROW, "full", 1)
    places, gib = planner.placements, 2**30

    def chosen(costs, hosts, room=None, fitting=1):
        cost = dict(zip(places, costs, strict=True))

        def plans_of(one, name):
            where = places.index(one)
            host, budget = {"load": 0, "step": hosts[where] * gib}, None if where >= fitting else 1
            room_bytes = None if room is None else room * gib
            changed = {"host": host, "budget_bytes": budget, "host_budget_bytes": room_bytes}
            return [replace(least, placement=one, in_effect=one, recomputed=0.5, **changed)]

        (plan,) = choose(places, ["adamw"], plans_of, lambda plan: cost[plan.placement], True)
        return places.index(plan.placement), plan

    rising = [0, 0, 1, 20, 40]
    assert chosen([100, 100, 99, 97, 96], rising)[0] == 1
    found, plan = chosen([100, 100, 99, 80, 79], rising)
    assert found == 3
    assert "faster as planned by 20% than MLPs in tiles, which fits too" in plan.placed()
    assert chosen([100, 100, 99, 80, 60], rising)[0] == 4
    assert chosen([100, 100, 99, 80, 60], rising, room=20)[0] == 3
    assert chosen([100, 100, 99, 97, 96], [0] * 5)[0] == 4  # for nothing any gain is taken
    found, plan = chosen([5, 4, 3, 2, 1], rising, room=30, fitting=4)
    assert (found, plan.fits, plan.host_wanted_bytes) == (3, False, 40 * gib)


def test_what_the_host_has_free_is_a_limit_where_it_is_known(config):
    """Layers whose inputs move are selective within it; not where nobody knows it."""
    training = TrainingConfig(optim="adamw", offload_activations=True, batch_size=1)
    clock, row = Clock(CARDS["rtx3060"]), BatchShape(1, 16384, 16384)
    unknown = Planner(config, LoRAConfig(), training, "cuda", clock=clock)
    where = unknown.placements[0]
    full, selective, none = (
        unknown.plan(row, level, placement=where) for level in ("full", "selective", "none")
    )
    budget = max(map(needs, (full, selective))) + 1_000_000
    assert budget < needs(none)
    assert selective.beside_bytes > full.beside_bytes > 0
    assert "selective" not in unknown.plan(row, "auto", budget, placement=where).levels
    for room in (full.beside_bytes, full.beside_bytes + 1, 10**12):
        known = Planner(config, LoRAConfig(), training, "cuda", clock=clock, host_bytes=room)
        plan = known.plan(row, "auto", budget, placement=where)
        assert plan.fits
        assert plan.beside_bytes <= room
    assert "selective" in plan.levels
    less = Planner(
        config, LoRAConfig(), training, "cuda", clock=clock, host_bytes=full.beside_bytes - 1
    )
    plan = less.plan(row, "full", budget, placement=where)
    assert (plan.fits, plan.missing_bytes, plan.missing_on_host_bytes) == (False, 0, 1)


def test_the_longest_rows_fit_and_longer_ones_do_not(planner):
    budget = 2 * 10**9
    for placement in (planner.placements[0], planner.placements[-1]):
        for level in ("none", "full"):
            if level == "none" and placement.activations_on_host:
                continue
            most = planner.run.context
            found = longest_rows(planner, ROW, level, budget, placement, 1, most)
            assert STEP <= found.tokens <= most

            def plan(length, level=level, placement=placement):
                shape = BatchShape(1, length, length)
                return planner.plan(shape, level, budget, 1, placement=placement)

            assert plan(found.tokens).fits
            assert found.plan.peak_bytes == plan(found.tokens).peak_bytes
            assert found.is_most == (found.tokens == most)
            assert found.is_most or not plan(found.tokens + STEP).fits
    nothing = longest_rows(planner, ROW, "full", 10**8, ON_DEVICE, 1, 4096)
    assert (nothing.tokens, nothing.plan.fits) == (0, False)


def test_suggestions_name_what_was_asked_to_stay(config):
    """With its peak, the mildest that fits; and the longest rows, to within a few tokens."""
    kept = TrainingConfig(
        optim="adamw", gradient_checkpointing="full", **dict.fromkeys(PLACED, False)
    )
    planner = Planner(config, LoRAConfig(), kept, "cuda")
    shape = BatchShape(1, 8192, 8192)
    plan = planner.plan(shape, micro_steps=kept.gradient_accumulation_steps)
    budget = needs(plan) - 30_000_000
    options = Options(config, LoRAConfig(), kept, 8192)
    found = {one.change: one.plan for one in suggest(options, planner, "cuda", budget)}
    assert all(one.fits for one in found.values())
    assert any(change.startswith("--tiled_mlp") for change in found)
    (length,) = (int(one.split()[1]) for one in found if one.startswith("--max_length"))
    assert 4096 <= length < 8192
    longer = BatchShape(1, length + STEP, length + STEP)
    assert not planner.plan(longer, "full", budget, kept.gradient_accumulation_steps).fits


def test_a_copy_hides_behind_the_work_of_its_layer():
    """An interval takes the longer of both, by the card's link and by its units."""
    card = CARDS["rtx4090"]
    work, copy = Work("matmul", 10**12, 1, 1), Work(TRANSFER, 0, 10**8, 1)

    def seconds(*works):
        interval = Interval("forward", "layer", {}, {}, {}, {}, peak=0, work=Counter(works))
        return sum(interval_seconds(interval, card).values())

    assert seconds_of(copy, card) == pytest.approx(10**8 / 25.2e9, rel=0.01)  # PCIe 4.0 x 16
    assert seconds(work, copy) == pytest.approx(max(seconds(work), seconds_of(copy, card)))
    many = [copy._replace(bytes=size) for size in (10**9, 10**9 + 1)]
    assert seconds(work, *many) == pytest.approx(sum(seconds_of(one, card) for one in many))


def test_a_byte_is_worth_what_cards_do_meanwhile():
    rates = sorted(card.matmul_rate / 2 / card.link_rate for card in CARDS.values())
    assert pytest.approx(rates[len(rates) // 2], rel=0.1) == WORK_OF_A_BYTE


def test_the_command_says_what_it_chose(config, capsys):
    options = ["--model", config.model, "--bits", "4", "--max_length", "4096", "--optim", "adamw"]
    options += ["--gradient_checkpointing", "full", "--device_memory"]
    assert main([*options, "8GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not any(plan["placement"].values())
    assert plan["peak_bytes_without"] is None
    less = str(plan["peak_bytes"] + plan["margin_bytes"] - 1)
    kept = ["--no_offload_base", "--no_offload_embedding", "--no_offload_activations"]
    assert main([*options, less, *kept, "--longest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["placement"] == plan["placement"] | {"mlp_tiled": True}
    assert found["peak_bytes_without"] == plan["peak_bytes"]
    assert found["host_peak_bytes"] == max(found["host"].values())
    longest = {
        (one["gradient_checkpointing"], one["placement"]["mlp_tiled"]): one["tokens"]
        for one in found["longest"]
    }
    assert longest["full", True] > longest["full", False] >= 4096 - 64
    assert main([*options, less, *kept]) == 0
    assert (
        "placement: MLPs in tiles: with all on the device and without tiles the peak would be "
        in capsys.readouterr().out
    )


def test_no_tiles_are_planned_of_layers_that_are_no_block(tmp_path):
    """Nor suggested: who asked for none would be told that a model has none."""
    path = tmp_path / "config.json"
    own = {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
    path.write_text(json.dumps({**SHAPE, **own, "num_hidden_layers": 2}))
    base = BaseConfig(str(path), bits=4, dtype="bf16")
    planner = Planner(base, LoRAConfig(), TrainingConfig(optim="adamw"), "cuda")
    assert not any(one.mlp_tiled for one in planner.placements)
    assert len(planner.placements) == len(PLACED)
    tiled = (ON_DEVICE, replace(ON_DEVICE, mlp_tiled=True))
    short = replace(ROW, length=64, supervised=64)
    (plan,) = planner.plans([(short, 1)], None, 1, placements=tiled)
    assert (plan.fits, plan.placement) == (False, ON_DEVICE)  # a run goes on with nothing new
    asked = TrainingConfig(optim="adamw", tiled_mlp=False, batch_size=1)
    options = Options(base, LoRAConfig(), asked, 64)
    assert suggest(options, planner, "cuda", 1) == []


def test_a_plan_says_what_is_moved_and_not_what_was_asked_for(config, tmp_path):
    """With levels that recompute nothing, or an embedding that the head shares, nothing is."""
    asked = TrainingConfig(optim="adamw", offload_activations=True, offload_embedding=True)
    planner = Planner(config, LoRAConfig(), asked, "cuda")
    said = {level: planner.plan(ROW, level).placed() for level in ("none", "full")}
    assert said["none"] == "embedding in host memory"
    assert said["full"] == "embedding and inputs of layers in host memory"
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SHAPE, "tie_word_embeddings": True}))
    tied = Planner(replace(config, model=str(path)), LoRAConfig(), asked, "cuda").plan(ROW, "none")
    assert tied.placed() == ""
    assert not any(tied.as_json()["placement"].values())
    assert tied.placement.embedding_on_host  # which the run is told of where it loads

"""Laws of automatic micro-batches: the same steps, in the fewest seconds that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.base.open import open_base
from qlora_kit.commands.plan import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.cards import CARDS
from qlora_kit.errors import ConfigError
from qlora_kit.plan.step_time import Clock
from qlora_kit.run.planned import RunPlans, planned_run
from qlora_kit.run.resume import resumed_training
from qlora_kit.training.checkpoint import Checkpoint

CARD = CARDS["rtx4090"]
TRAINING = TrainingConfig(max_steps=3, gradient_accumulation_steps=4, gradient_checkpointing="none")
RANK = 8


@pytest.fixture(scope="module")
def run():
    """A run on the CPU, its base, and 64 rows of different lengths."""
    base = BaseConfig("tiny", bits=4, dtype="bf16", device="cpu")
    config = RunConfig(base=base, lora=LoRAConfig(r=RANK), training=TRAINING)
    rows = [Encoded(ids, ids) for ids in ([5] * (20 + number % 7) for number in range(64))]
    return config, open_base(base), StepSchedule.of_run(rows, config.data, TRAINING, 0)


def test_a_known_card_gets_larger_micro_batches_of_the_same_steps(run):
    config, base, schedule = run
    plans = RunPlans(config, base, schedule, RANK, Clock(CARD))
    one = plans.within(10**12)
    plans.take_fastest(one.peak_bytes + one.margin_bytes)
    assert plans.schedule.batch_size == 1  # there is room for no more
    plans.take_fastest(10**12)
    found = plans.schedule
    # So few tokens are as dear as many: all of a step come at once.
    assert (found.batch_size, found.accumulation) == (TRAINING.step_rows, 1)
    assert len(found) == len(schedule)
    for step in (1, 2, 3):
        assert found.rows_of(step) == schedule.rows_of(step)
    supervised = [
        [sum(batch["num_supervised"] for batch in batches) for batches in steps]
        for steps in (found, schedule)
    ]
    assert supervised[0] == supervised[1]


def test_elsewhere_the_default_is_one_row_at_a_time(run):
    config, base, schedule = run
    found, _ = planned_run(config, base, schedule, RANK)
    assert (found.batch_size, found.accumulation) == (1, 4)
    assert (TrainingConfig().rows, TrainingConfig().step_rows) == (1, 16)
    assert TrainingConfig(batch_size="auto") == TrainingConfig()  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_budget_that_is_too_small_is_answered_with_what_can_be_lowered(run, bits):
    """Fewer than 4 bits, or less than a row, are not to be had."""
    config, base, schedule = run
    if bits == 8:
        config = replace(
            config, base=replace(config.base, bits=8, quant_type=None, double_quant=None)
        )
        base = open_base(config.base)
    asked = {"gradient_checkpointing": "auto", "memory_budget": "1MiB", "batch_size": bits - 3}
    config = replace(config, training=replace(TRAINING, **asked))
    with pytest.raises(ConfigError, match="raise it by that, or lower --max_length") as refused:
        planned_run(config, base, schedule, RANK)
    flags = " or --batch_size or --bits;" if bits == 8 else ";"
    assert f"or lower --max_length{flags} " in str(refused.value)


def test_a_resumed_run_has_the_micro_batches_that_it_began_with():
    def resumed(training, **options):
        checkpoint = Checkpoint(Path("checkpoint-1"), 1, {}, {"config": options})
        found = resumed_training(training, checkpoint)
        return found.batch_size, found.gradient_accumulation_steps

    saved = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert resumed(TrainingConfig(), **saved) == (8, 2)
    # Of other steps it is refused like any other difference; what is given stays.
    assert resumed(TrainingConfig(gradient_accumulation_steps=4), **saved) == (1, 4)
    assert resumed(TrainingConfig(batch_size=1), **saved) == (1, 16)
    assert resumed_training(TrainingConfig(), None).batch_size is None


def test_the_plan_of_a_card_chooses_rows(capsys):
    options = ["--model", "tiny", "--max_length", "64", "--lora_r", "8", "--card", "rtx4090"]
    options += ["--gradient_checkpointing", "none", "--gradient_accumulation_steps", "4"]
    found = []
    for more in ([], ["--batch_size", "1"]):
        assert main([*options, "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    chosen, single = found
    assert chosen["batch_size"] > single["batch_size"] == 1
    # The same rows a step, sooner.
    assert chosen["time"]["step_s"] < single["time"]["step_s"]
    tokens = [one["time"]["step_s"] * one["time"]["tokens_per_s"] for one in found]
    assert tokens[0] == pytest.approx(tokens[1])


def test_the_same_steps_are_the_same_rows():
    training = replace(TrainingConfig(), gradient_accumulation_steps=12)
    for rows in (1, 2, 3, 4, 6, 12):
        assert training.in_micro_batches_of(rows).step_rows == 12

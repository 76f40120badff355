"""The ready configurations are accepted as they stand, and fit the cards that they are named after.

A plan for CUDA needs no GPU. The shape comes from the test material; `benchmarks/cards.py` plans
the other ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_kit.commands.argv import parse
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.run import RUN_GROUPS
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.checks import size_bytes

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SHAPES = {
    "mistral-7b": "mistral_7b",
    "llama3.1-8b": "llama3_1_8b",
    "llama2-13b": "llama2_13b",
}
DATA = os.environ.get("QLORA_KIT_DATA")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted_and_names_its_card(path):
    parsed = parse("qlora-kit finetune", "", RUN_GROUPS, ["--config", str(path)])
    budget = parsed[TrainingConfig].memory_budget
    assert path.stem == f"{budget.lower()}-{parsed[BaseConfig].model}"
    assert parsed[BaseConfig].model in SHAPES


@pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")
def test_the_example_for_the_smallest_card_fits_it():
    (path,) = (path for path in EXAMPLES if path.stem.startswith("8gb"))
    from qlora_kit.plan.plan_memory import plan_memory

    parsed = parse("qlora-kit finetune", "", RUN_GROUPS, ["--config", str(path)])
    shape = Path(DATA) / "configs" / f"{SHAPES[parsed[BaseConfig].model]}.json"
    training, length = parsed[TrainingConfig], parsed[DataConfig].max_length
    base = BaseConfig(str(shape), bits=parsed[BaseConfig].bits)
    plan = plan_memory(base, parsed[LoRAConfig], training, length=length, device="cuda")
    assert plan.fits
    assert plan.budget_bytes == size_bytes(training.memory_budget)

"""Which card a run is on: that of its number, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_kit.base.load import load_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import (
    allocator_peaks,
    available_bytes,
    compute_dtype,
    find_device,
    free_bytes,
)
from qlora_kit.errors import ResourceError
from qlora_kit.lora.inject import inject_lora
from qlora_kit.plan.asked_device import asked_budget, asked_device
from qlora_kit.training.optimizer import make_optimizer

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")


@pytest.fixture(autouse=True)
def _current_card() -> object:
    before = torch.cuda.current_device()
    yield
    torch.cuda.set_device(before)


def test_a_card_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ResourceError, match=f"sees {count} CUDA devices"):
        find_device(f"cuda:{count}")


def test_auto_is_the_card_and_a_dtype_that_it_multiplies() -> None:
    assert find_device("auto").type == "cuda"
    major, _ = torch.cuda.get_device_capability()
    assert compute_dtype("auto", find_device("auto")) is (
        torch.bfloat16 if major >= 8 else torch.float16
    )


def test_drawing_adapters_leaves_the_cards_generator_alone(bases: Path) -> None:
    base = load_base(str(bases / "llama2"), bits=4, device="cuda")
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    inject_lora(base.model, LoRAConfig(r=2), seed=7)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@several
def test_a_plan_asks_the_card_that_is_named() -> None:
    base = BaseConfig("tiny", device="cuda:1")
    assert asked_device(base, PlanConfig()) == "cuda"
    budget = asked_budget("cuda", TrainingConfig(), PlanConfig())
    assert budget == available_bytes(torch.device("cuda:1"))


@several
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_the_second_card_takes_everything(bases: Path, optim: str) -> None:
    free = free_bytes(torch.device("cuda:0"))
    device = find_device("cuda:1")
    assert torch.cuda.current_device() == 1
    base = load_base(str(bases / "llama2"), bits=4, device="cuda:1")
    model = inject_lora(base.model, LoRAConfig(r=4, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(optim, trained, 1e-3)
    ids = torch.randint(3, 200, (2, 33), device=device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device}
    assert allocator_peaks(device)[0] > 0
    assert torch.cuda.memory_allocated(0) == 0
    assert free_bytes(torch.device("cuda:0")) == free

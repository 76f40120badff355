"""A streamed base on a card: the numbers of a resident one, its memory, and copies that overlap."""

from __future__ import annotations

import time
from pathlib import Path

import device_laws as laws
import pytest
import torch
from families import save_checkpoint

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

STREAMED = Placement(base_on_host=True)
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    save_checkpoint(directory, "llama2", torch.bfloat16, **LARGE)
    return directory


def prepared(directory: Path, placement: Placement, dtype: str = "bf16") -> object:
    base = open_base(BaseConfig(str(directory), bits=4, dtype=dtype, device="cuda"))
    model = inject_lora(
        read_weights(base, placement=placement), LoRAConfig(target_modules="all-linear")
    )
    prepare_model(model, TrainingConfig(), "full", placement=placement)
    return model.train()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_streamed_step_is_that_of_a_resident_base(tmp_path: Path, bits: int) -> None:
    """Losses to the bit; gradients as far as fused attention's own order lets them be."""
    save_checkpoint(tmp_path, "llama3", torch.float32, num_hidden_layers=5)
    found = []
    for placement in (ON_DEVICE, STREAMED):
        base = open_base(BaseConfig(str(tmp_path), bits=bits, dtype="fp32", device="cuda"))
        model = read_weights(base, placement=placement)
        inject_lora(model, LoRAConfig(r=4, target_modules="all-linear"), seed=1)
        prepare_model(model.train(), TrainingConfig(), ["none", "full"] * 2 + ["selective"])
        found.append([laws.results_of(model, laws.alone()) for _ in range(3)])
    for resident, streamed in zip(*found, strict=True):
        assert torch.equal(resident["loss"], streamed["loss"])
        error, name = laws.worst_of(streamed, resident)
        assert error <= 1e-5, name


def test_it_takes_two_layers_and_hides_the_copies(large: Path) -> None:
    """At 4,096 tokens a layer computes for longer than it takes to come."""
    row = list(range(3, 200)) * 21
    batch = collate([Encoded(row[:4096], row[:4096])], 0)
    seconds, most = {}, {}
    for placement in (ON_DEVICE, STREAMED):
        model = prepared(large, placement)
        optimizer = make_optimizer("adamw", model.parameters(), 1e-4)
        train(model, [[batch]] * 2, optimizer)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train(model, [[batch]] * 5, optimizer)
        torch.cuda.synchronize()
        seconds[placement] = time.perf_counter() - began
        most[placement] = torch.cuda.max_memory_allocated()
        del model, optimizer
        torch.cuda.empty_cache()
    layer = 0.516 * (4 * 2048 * 2048 - 2 * 2048 * 1024 + 3 * 2048 * 5632)
    assert most[ON_DEVICE] - most[STREAMED] > 0.9 * (LARGE["num_hidden_layers"] - 2) * layer
    assert seconds[STREAMED] < 1.25 * seconds[ON_DEVICE], seconds

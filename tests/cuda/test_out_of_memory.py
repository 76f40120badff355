"""A card that is full: what its allocator says, what is kept of the attempt, and its segments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from micro_batches import ragged_rows

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.data.batch import collate
from qlora_kit.lora.inject import inject_lora
from qlora_kit.process.out_of_memory import is_out_of_memory, missing_bytes
from qlora_kit.training.guard import Guard
from qlora_kit.training.optimizer import make_optimizer, make_states
from qlora_kit.training.preflight import preflight

CAP = 2**30


@pytest.fixture
def capped() -> Iterator[None]:
    """The process may reserve 1 GiB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("capped")
def test_its_allocator_says_what_was_missing() -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2 * CAP, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(error.value)
    found = missing_bytes(str(error.value))
    assert found is not None
    assert 0 < found <= 2 * CAP


@pytest.mark.usefixtures("capped")
def test_an_attempt_that_did_not_fit_leaves_nothing() -> None:
    model = inject_lora(read_weights(open_base(BaseConfig("tiny", device="cuda"))), LoRAConfig())
    optimizer = make_optimizer("adamw", model.parameters(), 1e-2)
    make_states(optimizer)
    batch, found, fillers = collate(ragged_rows(8), 0), [], []
    preflight(model, optimizer, batch, Guard(model), accumulates=True)

    def make_room(missing: int | None) -> int:
        found.append(torch.cuda.memory_allocated())
        fillers.clear()
        return 0

    torch.cuda.empty_cache()
    while True:  # until nothing of a step fits beside them
        try:
            fillers.append(torch.empty(2**20, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            break
    before = torch.cuda.memory_allocated()
    preflight(model, optimizer, batch, Guard(model, recompute_more=make_room), accumulates=True)
    assert found[:1] == [before]

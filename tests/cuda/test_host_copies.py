"""Copies to the host and back on a card: right however late they are, waited for by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import device_laws as laws
import pytest
import torch
from adapted import adapted_model
from families import FAMILIES, token_ids

from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.transfer import PIECE, Copies, Transfers, Wait, copies_on
from qlora_kit.training.layer_forward import set_offload
from qlora_kit.training.loss import supervised_loss, to_device
from qlora_kit.training.offload import Offload
from qlora_kit.training.prepare import prepare_model

DEVICE = torch.device("cuda")
LONG = 20_000_000
"""Cycles: about ten milliseconds, which no kernel of a tiny model takes."""


class LateOnCard:
    """The copies of a card, each after a wait; or everything else late, and the copies not."""

    def __init__(self, copies_wait: bool) -> None:
        self._copies, self._copies_wait = copies_on(DEVICE), copies_wait

    def follow(self) -> None:
        if not self._copies_wait:
            torch.cuda._sleep(LONG)
        self._copies.follow()

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        if self._copies_wait:
            with self._copies.inside():
                torch.cuda._sleep(LONG)
        self._copies.copy(into, source)

    def ended(self) -> Wait:
        return self._copies.ended()

    def inside(self) -> AbstractContextManager[object]:
        return self._copies.inside()


@pytest.fixture(autouse=True)
def _empty_card() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_replayed_from_the_host_is_that_of_the_cpu(family: str) -> None:
    laws.check_replays_from_host(family, 4, "cuda")


@pytest.mark.parametrize("copies_wait", [True, False])
def test_so_it_is_where_copies_are_late_or_early(copies_wait: bool) -> None:
    """What is waited for in too few places is wrong in one of the two."""
    late: Callable[[], Copies] = lambda: LateOnCard(copies_wait)  # noqa: E731
    laws.check_replays_from_host("llama3", 16, "cuda", late)


def test_memory_is_page_locked_and_used_again() -> None:
    transfers = Transfers(DEVICE)
    for length in (PIECE // 2, 3 * PIECE // 4, 17):
        tensor = torch.randn(length, device=DEVICE)
        held = transfers.out(tensor)
        pieces = held.pieces
        assert all(piece.is_pinned() for piece in pieces)
        assert torch.equal(transfers.back(held), tensor)
        del held
    assert transfers._free


def test_rows_of_layers_leave_the_card_and_no_step_waits_for_that() -> None:
    """After forward the card has one row more than the model, and a step is asked for at once."""
    layers, rows, length = 8, 4, 2048
    settings = {"num_hidden_layers": layers, "max_position_embeddings": length}
    model = adapted_model("llama3", torch.bfloat16, own=False, targets="all-linear", **settings)
    model = model.to(DEVICE)
    prepare_model(model, TrainingConfig(), "full")
    ids = token_ids(rows, length).tolist()
    batch = laws.collate([laws.Encoded(row, row) for row in ids], 0)
    given, row = to_device(batch, DEVICE), 2 * rows * length * model.config.hidden_size
    losses, held = [], []
    for offload in (None, Offload()):
        set_offload(model, offload)
        for step in range(3):
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            # The first steps make what is made once.
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            try:
                loss = supervised_loss(model, given)
                left = torch.cuda.memory_allocated() - before
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
        held.append(left)
        del loss
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(held[0] - held[1] - (layers - 1) * row) <= row // 4

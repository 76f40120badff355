"""Layers that are replayed from the host: what goes out and comes back, and that nobody waits."""

from __future__ import annotations

import pytest
import torch
from accelerator import Copied, accelerator, in_order, of_batch, saved, small_batch

from qlora_kit.training.layer_forward import set_offload
from qlora_kit.training.loop import train_step
from qlora_kit.training.offload import Offload

LAYERS = 3


@pytest.mark.parametrize(("level", "packed"), [("full", True), ("selective", False)])
def test_what_layers_are_replayed_from_goes_out_and_comes_back(level: str, packed: bool) -> None:
    """A row of each layer but the last; of `selective` also the middle, and what attention gave."""
    batch = small_batch(packed)
    with accelerator() as card:
        model = card.adapted(
            saved("llama2", num_hidden_layers=LAYERS), recompute=level, packed=packed, dropout=0.1
        )
        set_offload(model, Offload())
        optimizer, given = card.optimizer(model), card.on_host(batch)
        with card.watch() as seen:
            loss, _ = train_step(model, [given], optimizer, step=1, max_grad_norm=1.0)
            assert loss.device == card.device
    row = Copied((2 * batch["input_ids"].numel() * model.config.hidden_size,), torch.uint8)
    out = seen.copied_out
    back = in_order(one for one in seen.copied_in if one not in of_batch(batch))
    assert back == in_order(out)
    assert seen.reads == []
    if level == "full":
        assert out == [row] * (LAYERS - 1)
        return
    statistics = [one for one in out if one != row]
    assert len(out) - len(statistics) == 3 * LAYERS - 1
    assert len(statistics) == LAYERS

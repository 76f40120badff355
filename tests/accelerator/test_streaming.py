"""A streamed base on a device of its own: what goes up, and that nothing waits for it."""

from __future__ import annotations

import pytest
from accelerator import accelerator, of_batch, saved, small_batch

from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.resident import streamed_of
from qlora_kit.config.training import Placement
from qlora_kit.training.loop import train_step

LAYERS = 4
FORMS = [
    ("llama3", {"bits": 4}, {}),
    ("llama_bias", {"bits": 8}, {"fused": False}),
    ("qwen3", {"bits": 16}, {"fused": False, "targets": "auto"}),
    ("gemma2", {"bits": 4}, {}),
]


@pytest.mark.parametrize("level", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "held", "trained"), FORMS)
def test_layers_go_up_as_they_are_read_and_nothing_waits(family, held, trained, level) -> None:
    """All of a layer that is computed with is on the device, or an operation would mix devices."""
    batch = small_batch()
    with accelerator() as card:
        model = card.adapted(
            saved(family, num_hidden_layers=LAYERS),
            placement=Placement(base_on_host=True),
            recompute=level,
            **held,
            **trained,
        )
        optimizer, given = card.optimizer(model), card.on_host(batch)
        step = {"step": 1, "max_grad_norm": 1.0}
        train_step(model, [given], optimizer, **step)
        assert all(p.device == card.device for p in model.parameters() if p.requires_grad)
        with card.watch() as seen:
            loss, _ = train_step(model, [given], optimizer, **step)
            assert loss.device == card.device
    assert seen.reads == []
    up = sum(one.nbytes for one in seen.copied_in) - sum(one.nbytes for one in of_batch(batch))
    streamed = (streamed_of(module) for module in decoder_layers(model)[1].modules())
    slot = next(one for one in streamed if one is not None).blocks[0]
    assert slot.device == card.device
    gradients = [p.nbytes for p in model.parameters() if p.requires_grad]
    assert up == (2 * LAYERS - 4) * slot.nbytes + sum(gradients)
    # They wait on the host until all are there.
    assert sorted(one.nbytes for one in seen.copied_out) == sorted(gradients)

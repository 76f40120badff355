"""The counted intervals of a real training step, to compare a plan with."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.data.batch import Batch
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import Interval
from qlora_kit.memory.profiler import count_step
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model


def counted_step(
    base: BaseConfig,
    lora: LoRAConfig,
    training: TrainingConfig,
    levels: str | Sequence[str],
    micro_batches: Sequence[Batch],
    first: Batch,
    placement: Placement = ON_DEVICE,
) -> list[Interval]:
    """The intervals of a second step; that on `first` makes the optimizer's states.

    Its workspace is one of its own: what other models left is not counted.
    """
    with own_workspace({}):
        model = read_weights(open_base(base), placement=placement)
        inject_lora(model, lora, seed=training.seed)
        prepare_model(model, training, levels, placement=placement)
        optimizer = make_optimizer(training.optim, model.parameters(), 1e-3)
        model.train()

        def step(micro_batches, counter=None):
            def passes(backward, micro_batches):
                loss = backward(micro_batches)
                if counter is not None:
                    counter.at("step")
                    counter.filling = "optimizer"
                return loss

            options = {"step": 1, "max_grad_norm": 1.0, "run_backward": passes}
            train_step(model, micro_batches, optimizer, **options)

        step([first])
        with count_step(model, optimizer, micro_batches=micro_batches) as counter:
            step(micro_batches, counter)
    return [one for one in counter.intervals if one.phase]

"""A real training step of random tokens, counted from place to place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.memory.counter import Interval, StorageCounter
from qlora_kit.memory.profiler import count_step
from qlora_kit.training.loop import Backward, train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model


def counted_intervals(model: Any, training: TrainingConfig, batch: Batch) -> list[Interval]:
    """The intervals of a step of a model with adapters, which nothing has prepared yet.

    It is the second one, which finds the optimizer's states; its workspace is one of its own.
    """
    with own_workspace({}):
        prepare_model(model, training, training.gradient_checkpointing)
        optimizer = make_optimizer(training.optim, model.parameters(), 1e-4)
        model.train()

        def step(counter: StorageCounter | None = None) -> None:
            def passes(backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
                loss = backward(micro_batches)
                if counter is not None:
                    counter.at("step")
                    counter.filling = "optimizer"
                return loss

            train_step(model, [batch], optimizer, step=1, max_grad_norm=1.0, run_backward=passes)

        step()
        with count_step(model, optimizer, micro_batches=[batch]) as counter:
            step(counter)
    return [one for one in counter.intervals if one.phase]


def random_batch(tokens: int, rows: int, length: int) -> Batch:
    """Rows of random token ids below `tokens`, all trained on."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tokens, (rows, length), generator=draw).tolist()
    return collate([Encoded(one, list(one)) for one in ids], pad_id=0)
